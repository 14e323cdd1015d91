"""The requests that an API server has with its engine: their last check, and what follows them.

vLLM's `OutputProcessor` keeps the state of each request in one dictionary, from just before it goes
to the engine until it has ended. All endpoints' requests pass through there, including those that
are new in vLLM: what a tenant was not granted is refused, whatever let it through before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMNotFoundError

from vllm_multilora.adapters.blend import folders_of
from vllm_multilora.integration.api_server.failure_delivery import HIDDEN_FOLDERS
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.server.requests import metering
from vllm_multilora.integration.server.requests.callers import current_caller
from vllm_multilora.tenants.limits import Meter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

SEE_OFF: Attached[Callable[[LoRARequest], None]] = Attached("see-off")
"""What an `OutputProcessor` calls with the adapter of every request that goes to the engine. It
raises if the request is not to go there."""


class RequestStates(dict[str, Any]):
    """vLLM's `RequestState` of each request that has not ended, by internal id.

    vLLM puts a state in when the request is on its way to the engine, in its client's context, and
    takes it out by `pop` when the request has ended or is aborted.
    """

    def __init__(self, processor: Any) -> None:
        super().__init__(processor.request_states)
        self._processor = processor

    def __setitem__(self, request_id: str, state: Any) -> None:
        caller, adapter = current_caller.get(), state.lora_request
        if caller is not None:
            caller.end_text()
            name = None if adapter is None else adapter.lora_name
            if caller.tenant is not None and name not in caller.granted:
                raise VLLMNotFoundError("The model does not exist.")
            if state.request_index == 0:
                parent = state.parent_req
                caller.count_answers(1 if parent is None else parent.sampling_params.n)
        if adapter is not None and (see_off := SEE_OFF.get(self._processor)):
            see_off(adapter)
        super().__setitem__(request_id, state)
        if (meter := metering.METER.get(self._processor)) is not None:
            meter.begin(state)
        if caller is None:
            return
        if caller.hides_folders:
            own = () if adapter is None else folders_of(adapter.lora_path)
            HIDDEN_FOLDERS.set(state, (*caller.folders, *own))
        if caller.account is not None:
            # The children of a request with several answers share their prompt.
            caller.account.charge(state.prompt_len if state.request_index == 0 else 0)
            detokenizer = state.detokenizer  # pooling requests have none, and generate nothing
            read = (lambda: 0) if detokenizer is None else detokenizer.num_output_tokens
            caller.account.watch(Meter(read, lambda: self.get(request_id) is not state))

    def pop(self, request_id: str, *default: Any) -> Any:
        state = super().pop(request_id, *default)
        if state is not None and (meter := metering.METER.get(self._processor)) is not None:
            meter.end(state)
        return state


def follow(processor: Any) -> None:
    """Has all requests of vLLM's `OutputProcessor` checked and followed from now on."""
    processor.request_states = RequestStates(processor)
