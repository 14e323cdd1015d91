"""The last check of a request in the API server before it goes to the engine.

All endpoints pass through here, including those that are new in vLLM: what a tenant was not granted
is refused, whatever let it through before.
"""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError

from vllm_multilora.adapters.blend import folders_of
from vllm_multilora.integration.api_server.failure_delivery import HIDDEN_FOLDERS
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.server.requests import metering
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.settings.gateway_activation import (
    GATEWAY,
    is_gateway_missing,
)
from vllm_multilora.tenants.limits import Meter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SEE_OFF: Attached[Callable[[LoRARequest], None]] = Attached("see-off")
"""What an `OutputProcessor` calls with the adapter of every request that goes to the engine. It
raises if the request is not to go there."""


def add_request(
    original: Callable[..., None],
    processor: Any,
    request: Any,
    prompt: Any,
    parent: Any = None,
    index: int = 0,
    *args: Any,
    **kwargs: Any,
) -> None:
    caller = current_caller.get()
    if caller is None and is_gateway_missing():
        raise GracefulHTTPError(
            f"This server has keys, and its application lacks what enforces them, the middleware "
            f"{GATEWAY}: start it with `vllm serve`",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )
    is_new = request.request_id not in processor.request_states
    if caller is not None:
        caller.end_text()
        require_granted(request, caller)
        if is_new and index == 0 and not metering.is_of_beam_search():
            caller.count_answers(1 if parent is None else parent.sampling_params.n)
    if is_new and request.lora_request is not None and (see_off := SEE_OFF.get(processor)):
        see_off(request.lora_request)
    original(processor, request, prompt, parent, index, *args, **kwargs)
    state = processor.request_states.get(request.request_id)
    if state is not None and is_new:
        metering.begin(processor, state)
    if caller is None or state is None:
        return
    if caller.hides_folders:
        adapter = request.lora_request
        own = () if adapter is None else folders_of(adapter.lora_path)
        HIDDEN_FOLDERS.set(state, (*caller.folders, *own))
    if caller.account is not None:
        # The children of a request with several answers share their prompt.
        caller.account.charge(state.prompt_len if index == 0 else 0)
        caller.account.watch(meter(processor, state))


def require_granted(request: Any, caller: Caller) -> None:
    """Refuses what nobody has granted.

    Raises:
        VLLMNotFoundError: Nobody has granted the request what would answer it.
    """
    tenant = caller.tenant
    if tenant is None:
        return
    adapter = request.lora_request
    name = None if adapter is None else adapter.lora_name
    if name not in caller.granted:
        raise VLLMNotFoundError("The model does not exist.")


def meter(processor: Any, state: Any) -> Meter:
    """What counts the tokens that a request generates; state: vLLM's `RequestState`."""
    detokenizer = state.detokenizer  # pooling requests have none, and generate nothing
    states, name = processor.request_states, state.request_id
    return Meter(
        read=(lambda: 0) if detokenizer is None else detokenizer.num_output_tokens,
        has_ended=lambda: states.get(name) is not state,
    )
