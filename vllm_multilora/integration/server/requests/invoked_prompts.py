"""Refuses a streamed prompt that does not invoke its activated adapter, before its stream begins.

The engine ends such a request too, but the status of a stream is sent before the engine sees the
prompt. Other answers wait for the engine, and so do prompts that are not all tokens here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.exceptions import GracefulHTTPError

from vllm_multilora.integration.activated import last_occurrence
from vllm_multilora.integration.failed_requests import STATUS, uninvoked
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call

if TYPE_CHECKING:
    from vllm_multilora.integration.api_server.registered_versions import Version


def expect(call: HttpCall, request: Any, version: Version | None) -> None:
    """Notes what the prompts of a request have to contain.

    Args:
        call: The HTTP request.
        request: One of vLLM's parsed requests, which is bound to its adapter.
        version: The adapter's; None where no engine has read it yet.

    Raises:
        GracefulHTTPError: With status 400, for prompts that are embeddings.
    """
    begins = getattr(request, "stream", False) and not getattr(request, "background", False)
    call.invocation = version.invocation if begins and version and not call.renders else ()
    if call.invocation and getattr(request, "prompt_embeds", None) is not None:
        _refuse(call, None)


def process_tokens(original: Callable[..., Any], renderer: Any, prompt: Any, **kwargs: Any) -> Any:
    require(prompt, renderer)
    return original(renderer, prompt, **kwargs)


def require(prompt: Any, renderer: Any) -> None:
    """Refuses a prompt of the HTTP request at hand that lacks what was noted.

    Args:
        prompt: vLLM's, in tokens.
        renderer: vLLM's, which has the model's tokenizer or None.

    Raises:
        GracefulHTTPError: With status 400 and the tokens that are missing.
    """
    call = current_call.get()
    if call is None or not call.invocation or prompt.get("multi_modal_data"):
        return
    if last_occurrence(prompt["prompt_token_ids"], call.invocation) is None:
        _refuse(call, renderer.tokenizer)


def _refuse(call: HttpCall, tokenizer: Any) -> NoReturn:
    failure = uninvoked(str(call.adapter), call.invocation, tokenizer)
    raise GracefulHTTPError(failure.message, STATUS[failure.kind])
