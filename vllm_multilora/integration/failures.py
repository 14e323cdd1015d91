"""How a failed load reaches the client whose request it fails, and nobody else.

The engine core ends the request with vLLM's own finish reason for errors; the reason travels as
the output's stop reason, which vLLM carries through unread, and is taken out again in the process
that answers: as an HTTP status and message there, as finish reason and text for `LLM.generate`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError, LoRAAdapterNotFoundError
from vllm.v1.engine import FinishReason

from vllm_multilora.cache.load_failures import (
    FailureKind,
    LoadFailedError,
    LoadFailure,
    classify_failure,
)

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_PREFIX = "multilora-load-failure:"

watchers: list[Callable[[LoRARequest, LoadFailure], None]] = []
"""Called in the process that answers, with an adapter whose load has failed requests."""

REFUSAL_MARK = "\nmultilora-refused:"
"""Separates a refusal's sentences from its fields."""

STATUS = {
    FailureKind.GONE: HTTPStatus.NOT_FOUND,
    FailureKind.INVALID: HTTPStatus.BAD_REQUEST,
    FailureKind.UNREADABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.NO_MEMORY: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.TIMEOUT: HTTPStatus.SERVICE_UNAVAILABLE,
    FailureKind.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
}


def to_stop_reason(failure: LoadFailure, adapter: LoRARequest) -> str:
    """A failure as the text that travels with a request's last output.

    Files are named without the adapter's folder, which is the operator's affair: vLLM takes paths
    out of what it tells clients, file names and all.
    """
    message = without_folder(failure.message, adapter)
    return _stop_reason(
        failure.kind, f"adapter {adapter.lora_name!r} could not be loaded: {message}"
    )


def unloaded_stop_reason(adapter: LoRARequest, limit_s: float) -> str:
    """The text of a request that had not ended when its adapter had to go."""
    return _stop_reason(
        FailureKind.GONE,
        f"adapter {adapter.lora_name!r} was unloaded, and this request did not end within the "
        f"{limit_s:g} s that running requests have then (--multilora-unload-timeout-s)",
    )


def _stop_reason(kind: FailureKind, message: str) -> str:
    return f"{_PREFIX}{kind.value}:{message}"


def without_folder(text: str, adapter: LoRARequest) -> str:
    """A text with the files of an adapter's folder named alone."""
    return text.replace(f"{adapter.lora_path.rstrip('/')}/", "")


def from_stop_reason(stop_reason: Any) -> LoadFailure | None:
    """The failure in a stop reason; None if it is another kind of stop."""
    if not isinstance(stop_reason, str) or not stop_reason.startswith(_PREFIX):
        return None
    kind, _, message = stop_reason.removeprefix(_PREFIX).partition(":")
    return LoadFailure(FailureKind(kind), message)


def http_error(failure: LoadFailure) -> GracefulHTTPError:
    """What a server answers: 404 gone, 400 invalid, 503 where a later try may help."""
    return GracefulHTTPError(failure.message, STATUS[failure.kind])


def classify(error: BaseException) -> FailureKind:
    """The kind of failure that an exception of a load stands for, vLLM's own among them."""
    return (
        FailureKind.GONE if isinstance(error, LoRAAdapterNotFoundError) else classify_failure(error)
    )


def deliver_failures(engine_core_outputs: list[Any], request_states: dict[str, Any]) -> None:
    """Turns failures among a step's outputs into what their requests' readers understand.

    Args:
        engine_core_outputs: As the engine core sent them; stop reasons become plain text.
        request_states: vLLM's request states by internal request id.
    """
    for output in engine_core_outputs:
        if output.finish_reason is not FinishReason.ERROR:
            continue
        failure = from_stop_reason(output.stop_reason)
        if failure is None:
            continue
        output.stop_reason = failure.message
        state = request_states.get(output.request_id)
        if state is not None and state.lora_request is not None:
            for watch in watchers:
                watch(state.lora_request, failure)
        if state is not None and state.queue is not None:
            # An exception in the queue is what the reader gets, before any output.
            state.queue.put(http_error(failure))


class AdapterRefusedError(LoadFailedError):
    """An adapter could not be registered; says all that is wrong, for people and for programs.

    The text is all that reaches another process, so it carries the fields along at its end.
    """

    def __init__(self, lora_id: int, failure: LoadFailure, problems: list[dict[str, Any]]) -> None:
        super().__init__(lora_id, failure)
        self.problems = problems
        self._fields = json.dumps({"kind": failure.kind.value, "problems": problems})

    def __str__(self) -> str:
        messages = [
            f"{problem['message']}; {problem['hint']}" if problem["hint"] else problem["message"]
            for problem in self.problems
        ]
        return "\n".join(messages or [self.failure.message]) + REFUSAL_MARK + self._fields
