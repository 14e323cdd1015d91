"""A failed request's reason reaches its reader, and leaves nothing behind."""

import logging
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector

from vllm_multilora.failures import FailureKind, LoadFailure
from vllm_multilora.integration.api_server.failure_delivery import (
    HIDDEN_FOLDERS,
    deliver_failures,
    process_outputs,
)
from vllm_multilora.integration.failed_requests import (
    RefusalsInOneLine,
    to_stop_reason,
    uninvoked_stop_reason,
)

SAMPLING = SamplingParams(max_tokens=3)


def test_one_line_is_logged_of_a_request_whose_adapter_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its client may send it as often as it likes. Other errors keep their words and tracebacks."""

    class QueueFullError(GracefulHTTPError):
        """As vLLM has them."""

    filtered = RefusalsInOneLine()
    reason = f"adapter 'acme' could not be loaded: {'its file is missing, ' * 20}to begin with"
    caplog.handler.addFilter(filtered)
    try:
        status = HTTPStatus.SERVICE_UNAVAILABLE
        for error in (
            GracefulHTTPError(reason, status),
            QueueFullError("vLLM's own", status),
            RuntimeError("vLLM's own"),
        ):
            try:
                raise error
            except Exception:
                logging.getLogger("somewhere").exception("Error in a stream.")
    finally:
        caplog.handler.removeFilter(filtered)
    failed, *others = (caplog.handler.format(record) for record in caplog.records)
    assert failed.splitlines() == [failed]
    assert f"Request failed: {reason}" in failed
    for other in others:
        assert "Error in a stream." in other
        assert "Traceback" in other


def test_a_missing_invocation_is_reported_where_the_tokenizer_lacks_the_tokens() -> None:
    """The exception would end the task that hears the engine, and the whole server with it."""

    def decode(tokens: list[int]) -> str:
        raise IndexError("piece id is out of range")

    reason = uninvoked_stop_reason(LoRARequest("acme", 1, "/acme"), (32_007,))
    output = SimpleNamespace(request_id="r", finish_reason=FinishReason.ERROR, stop_reason=reason)
    deliver_failures([output], {}, tokenizer=SimpleNamespace(decode=decode))
    assert "is activated by the tokens [32007], which" in output.stop_reason


def state_of(lora: LoRARequest) -> SimpleNamespace:
    """vLLM's, of a request of `LLM` that generates."""
    return SimpleNamespace(
        lora_request=lora,
        detokenizer="",
        queue=None,
        external_req_id="0",
        streaming_input=False,
    )


def test_a_failure_names_no_folder_that_its_request_may_not_see() -> None:
    acme = LoRARequest("acme", 1, "/srv/acme")
    failure = LoadFailure(FailureKind.GONE, "/srv/shared/keys.pem is gone")
    state = state_of(acme)
    HIDDEN_FOLDERS.set(state, ("/srv",))
    output = EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR)
    output.stop_reason = to_stop_reason(failure, acme)
    deliver_failures([output], {"r": state})
    assert "is gone" in output.stop_reason
    assert "/srv" not in output.stop_reason


def test_nothing_is_kept_of_a_session_that_has_failed_while_more_input_may_come() -> None:
    acme = LoRARequest("acme", 1, "/acme")
    processor = OutputProcessor(None, log_stats=False)
    request = EngineCoreRequest(
        request_id="session",
        external_req_id="session",
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SAMPLING,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=acme,
        cache_salt=None,
        data_parallel_rank=None,
        resumable=True,
    )
    queue = RequestOutputCollector(SAMPLING.output_kind, "session")
    OutputProcessor.add_request(processor, request, None, None, 0, queue)
    reason = to_stop_reason(LoadFailure(FailureKind.GONE, "gone"), acme)
    failed = EngineCoreOutput("session", [], finish_reason=FinishReason.ERROR, stop_reason=reason)
    processed = process_outputs(OutputProcessor.process_outputs, processor, [failed])
    with pytest.raises(GracefulHTTPError, match="'acme' could not be loaded"):
        queue.get_nowait()
    assert not processor.request_states
    # The engine takes input that was on its way for that of a new one.
    assert processed.reqs_to_abort == ["session"]
