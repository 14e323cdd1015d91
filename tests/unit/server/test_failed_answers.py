"""Endpoints of vLLM's that would lose the reason of a failed request tell it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.responses.context import SimpleContext
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError
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
from vllm_multilora.integration.patching.tables.ledger import PATCHES
from vllm_multilora.integration.server.requests import failed_answers

HANDLERS = "server.requests.failed_answers:"
LIMIT_S = 20.0
GONE = GracefulHTTPError("adapter 'acme' could not be loaded", HTTPStatus.NOT_FOUND)
NO_MEMORY = GracefulHTTPError("there is no memory", HTTPStatus.SERVICE_UNAVAILABLE)
ERROR = {"code": "invalid_prompt", "message": GONE.message, "type": "Not Found"}
NO_MEMORY_ERROR = {
    "code": "server_error",
    "message": NO_MEMORY.message,
    "type": "Service Unavailable",
}
SAMPLING = SamplingParams(max_tokens=3)


@pytest.fixture(autouse=True)
def active(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM with these handlers, for an engine that the plugin acts for; `is_on` may be changed."""
    for patch in PATCHES:
        if patch.handler.startswith(HANDLERS):
            assert patch.apply()
    state = SimpleNamespace(is_on=True)
    monkeypatch.setattr(failed_answers, "is_active_behind", lambda client: state.is_on)
    return state


def within_limit(scenario: Callable[[], Any]) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(LIMIT_S):
            return await scenario()

    return asyncio.run(run())


class Responses:
    """vLLM's endpoint without an engine, and a request whose reader gets a failure."""

    def __init__(self, failure: Exception = GONE) -> None:
        self.serving = OpenAIServingResponses.__new__(OpenAIServingResponses)
        self.serving.engine_client = SimpleNamespace(vllm_config=object())
        self.serving.use_harmony = False
        self.serving.response_store = {}
        self.serving.response_store_lock = asyncio.Lock()
        self.serving.event_store = {}
        self.request = ResponsesRequest(model="acme", input="hello", background=True)
        self._failure = failure

    def arguments(self) -> tuple[Any, ...]:
        return (self.request, SAMPLING, self._failing(), SimpleContext(), "acme", None, None)

    def keep(self, status: str) -> ResponsesResponse:
        kept = ResponsesResponse.from_request(self.request, SAMPLING, "acme", 1, [], status)
        self.serving.response_store[kept.id] = kept
        return kept

    async def _failing(self) -> AsyncIterator[Any]:
        raise self._failure
        yield


@pytest.mark.parametrize(
    ("failure", "error"), [(GONE, ERROR), (NO_MEMORY, NO_MEMORY_ERROR)], ids=["gone", "memory"]
)
def test_a_streamed_response_ends_with_its_failure(
    failure: GracefulHTTPError, error: dict[str, str]
) -> None:
    async def scenario() -> list[Any]:
        responses = Responses(failure)
        events = responses.serving.responses_stream_generator(*responses.arguments())
        return [event async for event in events]

    events = within_limit(scenario)
    kinds = [event.type for event in events]
    assert kinds == ["response.created", "response.in_progress", "response.failed"]
    assert [event.sequence_number for event in events] == [0, 1, 2]
    told = json.loads(events[-1].model_dump_json(by_alias=True))["response"]
    assert (told["status"], told["error"]) == ("failed", error)
    assert told["id"] == events[0].response.id
    assert events[0].response.status == "in_progress"


@pytest.mark.parametrize("failure", [GONE, EngineDeadError()], ids=["adapter", "engine"])
def test_a_streamed_response_in_the_background_ends_for_all_who_listen(failure: Any) -> None:
    """A server that is stopped waits for them, too."""

    async def scenario() -> None:
        responses = Responses(failure)
        serving, kept = responses.serving, responses.keep("queued")

        async def listen(starting_after: int | None = None) -> list[str]:
            events = serving.responses_background_stream_generator(kept.id, starting_after)
            return [event.type async for event in events]

        running = asyncio.create_task(
            serving._run_background_request_stream(*responses.arguments())
        )
        await asyncio.sleep(0)  # it has begun: its events are kept
        early = await listen()
        await running
        assert early == ["response.created", "response.in_progress", "response.failed"]
        assert await listen() == early
        assert await listen(1) == early[2:]
        assert kept.status == "failed"
        assert (kept.error == ERROR) is (failure is GONE)

    within_limit(scenario)


@pytest.mark.parametrize("status", ["cancelled", "completed"])
def test_a_response_that_is_not_to_be_made_any_more_stays_as_it_is(status: str) -> None:
    async def scenario() -> str:
        responses = Responses()
        kept = responses.keep(status)
        await responses.serving._run_background_request_stream(*responses.arguments())
        return kept.status

    assert within_limit(scenario) == status


@pytest.mark.parametrize("is_on", [False, True])
def test_other_failures_and_those_without_the_plugin_are_left_to_vllm(
    active: SimpleNamespace, is_on: bool
) -> None:
    active.is_on = is_on
    failure = RuntimeError("vLLM's own") if is_on else GONE

    async def scenario() -> str:
        responses = Responses(failure)
        kept = responses.keep("queued")
        with pytest.raises(type(failure)):
            async for _ in responses.serving.responses_stream_generator(*responses.arguments()):
                pass
        return kept.status

    assert within_limit(scenario) == "queued"


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


def test_a_missing_invocation_is_told_where_the_tokenizer_does_not_know_the_tokens() -> None:
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
