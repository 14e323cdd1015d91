"""Failures that come with a step's outputs, and how those who wait for the outputs get them.

The reader of a server's request gets an exception, which vLLM answers; what is asked of `LLM` gets
an answer that says why it has failed, so that the call's other requests end as they would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm import outputs
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import FinishReason

from vllm_multilora.failures import LoadFailure
from vllm_multilora.integration.api_server import policy_spans
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.failed_requests import STATUS, from_stop_reason, without_folders

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

ON_FAILURE: Attached[Callable[[LoRARequest, LoadFailure], None] | None] = Attached("on-failure")
"""What an `OutputProcessor` calls for every request with an adapter that has failed."""

ON_OUTPUTS: Attached[Callable[[Iterable[Any], dict[str, Any]], AbstractContextManager[None]]] = (
    Attached("on-outputs")
)
"""Given a step's outputs and all requests' states, what an `OutputProcessor` works in."""

AFTER_OUTPUTS: Attached[Callable[[], object]] = Attached("after-outputs")
"""Called by an `OutputProcessor` after each step's outputs."""

ANSWER_CHECKS: list[Callable[[], None]] = []
"""Called before a step's outputs are handed out; each raises where this process answers nobody."""

HIDDEN_FOLDERS: Attached[tuple[str, ...]] = Attached("hidden-folders")
"""Folders that the client of an API server's `RequestState` may not see."""


def deliver_failures(
    engine_core_outputs: list[Any],
    request_states: dict[str, Any],
    on_failure: Callable[[LoRARequest, LoadFailure], None] | None = None,
    tokenizer: Any = None,
) -> tuple[dict[str, LoadFailure], list[str]]:
    """Turns failures among a step's outputs into what their requests' readers understand.

    Args:
        engine_core_outputs: As the engine core sent them; stop reasons become plain text.
        request_states: vLLM's request states by internal request id.
        on_failure: Is told of every request with an adapter that has failed: which, and why.
        tokenizer: The model's; None where there is none.

    Returns:
        The failures of requests to `LLM`, by the ids of vLLM's answers to them: see `mark_failed`.
        And the internal ids of requests that had not had all of their input.
    """
    unmarked, sessions = {}, []
    for output in engine_core_outputs:
        if output.finish_reason is not FinishReason.ERROR:
            continue
        failure = from_stop_reason(output.stop_reason, tokenizer)
        if failure is None:
            continue
        state = request_states.get(output.request_id)
        if state is not None:
            folders = HIDDEN_FOLDERS.get(state) or ()
            failure = replace(failure, message=without_folders(failure.message, folders))
        output.stop_reason = failure.message
        if state is None:
            continue
        if on_failure is not None and state.lora_request is not None:
            on_failure(state.lora_request, failure)
        if state.detokenizer is None:
            # A pooling request. Without a result vLLM takes it for one that generates; then its
            # output task ends, and the whole server with it. Aborted ones get an empty one, too.
            output.pooling_output = torch.empty(0)
        if state.streaming_input:
            state.streaming_input = False  # vLLM would keep it for as long as more input may come
            sessions.append(output.request_id)
        if state.queue is not None:
            # An exception in the queue is what the reader gets, before any output.
            state.queue.put(GracefulHTTPError(failure.message, STATUS[failure.kind]))
        else:
            unmarked[state.external_req_id] = failure
    return unmarked, sessions


def mark_failed(request_outputs: list[Any], failures: dict[str, LoadFailure]) -> None:
    """Completes the answers to failed requests to `LLM`.

    Those of `LLM.generate` have said why by their finish and stop reasons. Those of `LLM.embed` and
    the like, which are empty, have nothing of that kind.
    """
    for output in request_outputs if failures else ():
        failure = failures.get(output.request_id)
        if failure is None:
            continue
        if isinstance(output, outputs.RequestOutput):
            for completion in output.outputs:
                # LLM.beam_search takes the first token's from a list, and ends if that is empty.
                completion.logprobs = completion.logprobs or None
        else:
            # vLLM 0.31 has neither the class nor the field.
            make_error: Any = getattr(outputs, "RequestError", SimpleNamespace)
            output.error = make_error(code=failure.kind.value, message=failure.message)


def process_outputs(
    original: Callable[..., Any],
    processor: Any,
    engine_core_outputs: list[Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    for check in ANSWER_CHECKS:
        check()
    states, look = processor.request_states, ON_OUTPUTS.get(processor)
    with nullcontext() if look is None else look(engine_core_outputs, states):
        failures, sessions = deliver_failures(
            engine_core_outputs, states, ON_FAILURE.get(processor), processor.tokenizer
        )
        mixed = policy_spans.note(engine_core_outputs, states)
        processed = original(processor, engine_core_outputs, *args, **kwargs)
        policy_spans.tell(mixed, processed.request_outputs)
    if (act := AFTER_OUTPUTS.get(processor)) is not None:
        act()
    mark_failed(processed.request_outputs, failures)
    # What was on its way to the engine has begun them again there, and nobody would end that.
    processed.reqs_to_abort.extend(sessions)
    return processed
