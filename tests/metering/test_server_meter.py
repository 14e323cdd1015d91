"""What an API server's meter counts of vLLM's requests; vLLM's classes, without an engine."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import PoolingParams, PoolingRequestOutput, RequestOutput
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import InputStreamError
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)
from vllm.v1.metrics.stats import PrefillStats
from vllm.v1.outputs import LogprobsLists

from vllm_multilora.gateway.names.names_middleware import expect_results
from vllm_multilora.integration.api_server.failure_delivery import process_outputs
from vllm_multilora.integration.engine.requests.weight_versions import KEY as VERSION_KEY
from vllm_multilora.integration.server.requests import engine_admission, metering
from vllm_multilora.integration.server.requests.callers import MAX_SCORES, Caller
from vllm_multilora.integration.server.requests.engine_calls import STOP
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call
from vllm_multilora.integration.server.requests.metering import PROMPT as PROMPT_OF
from vllm_multilora.integration.server.requests.metering import ServerMeter
from vllm_multilora.metering.usage_log import Status, Usage
from vllm_multilora.metrics import server_counts
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant

from ..metrics.readings import recorder, shown

PROMPT = [1, 2, 3, 4, 5]
REQUEST = CompletionRequest(model="acme", prompt=PROMPT)
CACHED = 3

STOCK_OUTPUTS = getattr(
    OutputProcessor.process_outputs, "__wrapped__", OutputProcessor.process_outputs
)  # another test may have loaded the plugin


class Log:
    """A usage log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[Usage] = []

    def write(self, usage: Usage) -> None:
        self.lines.append(usage)


def request_for_acme(request: CompletionRequest) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id="one-of-vllm's",
        external_req_id="one",
        prompt_token_ids=PROMPT,
        mm_features=None,
        sampling_params=request.to_sampling_params(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=LoRARequest("acme", 1, "/acme"),
        cache_salt=None,
        data_parallel_rank=None,
    )


def follow(processor: OutputProcessor, meter: ServerMeter) -> None:
    """Has a meter follow the requests that come, as a server does when it starts."""
    engine_admission.follow(processor)
    metering.attach(processor, meter)


def metered() -> tuple[Usage, RequestState]:
    """A request of which a token is generated, after a prompt that was cached in part."""
    request = CompletionRequest(model="acme", prompt=PROMPT)
    log, processor = Log(), OutputProcessor(None, log_stats=False)
    follow(processor, ServerMeter(log))
    processor.add_request(request_for_acme(request), None)
    (state,) = processor.request_states.values()
    prefill = PrefillStats(num_prompt_tokens=len(PROMPT), num_cached_tokens=CACHED)
    output = EngineCoreOutput(
        state.request_id, [7], finish_reason=FinishReason.LENGTH, prefill_stats=prefill
    )
    process_outputs(STOCK_OUTPUTS, processor, [output])
    (usage,) = log.lines
    assert (usage.prompt_tokens, usage.generated_tokens) == (len(PROMPT), 1)
    return usage, state


def test_a_request_that_is_named_twice_is_ended_once() -> None:
    log, processor = Log(), OutputProcessor(None, log_stats=False)
    follow(processor, ServerMeter(log))
    processor.add_request(request_for_acme(REQUEST), None)
    (state,) = processor.request_states.values()
    asked = [state.external_req_id, "nobody's", state.external_req_id]
    assert processor.abort_requests(asked, internal=False) == [state.request_id]
    assert [usage.status for usage in log.lines] == [Status.ABORTED]


@pytest.mark.parametrize("shutdown_timeout", [0, 60])
def test_what_runs_when_the_server_is_stopped_is_ended_and_counted_as_far_as_it_got(
    monkeypatch: pytest.MonkeyPatch, shutdown_timeout: int
) -> None:
    """Else its client waits for the rest, and the server for its client."""
    monkeypatch.setattr(STOP, "act", lambda: None)
    log, processor = Log(), OutputProcessor(None, log_stats=False)
    follow(processor, ServerMeter(log))

    async def scenario() -> None:
        answers = [RequestOutputCollector(RequestOutputKind.DELTA, name) for name in "12"]

        def ask(number: int) -> None:
            request = request_for_acme(REQUEST)
            request.request_id = str(number)
            processor.add_request(request, None, queue=answers[number])

        handler = asyncio.create_task(asyncio.Event().wait())
        config = SimpleNamespace(shutdown_timeout=shutdown_timeout)
        engine = SimpleNamespace(
            output_processor=processor, output_handler=handler, vllm_config=config
        )
        metering.end_all_at_shutdown(engine)
        ask(0)
        process_outputs(STOCK_OUTPUTS, processor, [EngineCoreOutput("0", [7, 8])])
        await asyncio.sleep(0)
        STOP.act()  # as the signal to stop does
        await asyncio.sleep(0)
        assert len(log.lines) == (0 if shutdown_timeout else 1)
        handler.cancel()
        ask(1)  # vLLM takes requests still
        for each in answers:
            with pytest.raises(GracefulHTTPError, match=r"^the server is being stopped"):
                await asyncio.wait_for(each.get(), 10)

    asyncio.run(scenario())
    assert [usage.status for usage in log.lines] == [Status.ABORTED] * 2
    assert [usage.generated_tokens for usage in log.lines] == [2, 0]
    processor.abort_requests(["0", "1"], internal=True)  # their clients have gone afterwards
    assert len(log.lines) == 2


def test_a_clock_that_was_set_back_takes_nothing_from_a_histogram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = recorder(tmp_path, "server", engine="", has_latencies=True)
    monkeypatch.setattr(server_counts.COUNTS, "_recorder", record)
    processor = OutputProcessor(None, log_stats=True)
    follow(processor, ServerMeter(None, has_latencies=True))
    for latency in (0.5, -3_600.0):
        processor.add_request(request_for_acme(REQUEST), None)
        (state,) = processor.request_states.values()
        state.stats.first_token_ts = 1.0
        state.stats.first_token_latency = latency
        processor.abort_requests([state.request_id], internal=True)
    name = "vllm:lora_time_to_first_token_seconds"
    found = shown(tmp_path)
    assert found[f"{name}_sum{{lora_name=acme}}"] == 0.5
    assert found[f"{name}_count{{lora_name=acme}}"] == 2


def test_what_the_engine_found_in_its_cache_is_counted() -> None:
    usage, _ = metered()
    assert usage.cached_tokens == CACHED


def scored(caller: Caller | None, *, streams: bool, read: bool = False) -> list[Any]:
    """What a client gets of a request whose tokens come with a third of what may be told each."""
    kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
    processor = OutputProcessor(None, log_stats=False)
    follow(processor, ServerMeter(None))
    request, queue = request_for_acme(REQUEST), RequestOutputCollector(kind, "one")
    most = MAX_SCORES // 3 - 1
    request.sampling_params = SamplingParams(
        logprobs=most, max_tokens=4, output_kind=kind, detokenize=False
    )
    processor.add_request(request, None, queue=queue)
    (state,) = processor.request_states.values()
    prompt = PROMPT_OF.get(state)
    assert prompt is not None
    prompt.caller = caller
    # As wide as another request of the step wants it.
    numbers = np.arange(2 * most, dtype=np.int64).reshape(1, -1)
    scores = LogprobsLists(numbers, -numbers.astype(np.float32), np.zeros(1, dtype=np.int64))
    got: list[Any] = []
    for number in range(4):
        reason = FinishReason.LENGTH if number == 3 else None
        output = EngineCoreOutput(state.request_id, [7], scores, finish_reason=reason)
        process_outputs(STOCK_OUTPUTS, processor, [output])
        if read or number == 3:
            try:
                got.append(queue.get_nowait())
            except InputStreamError as error:
                got.append(error)
    return [each for each in got if each is not None]


ACME = Caller(Role.TENANT, account=Account(Tenant("acme")))


def test_a_tenants_answer_has_few_enough_scores_to_tell_them_in_a_moment() -> None:
    """Nobody is answered meanwhile; the engine does not go on with it, as vLLM is told to abort."""
    (error,) = scored(replace(ACME), streams=False)
    assert isinstance(error, InputStreamError)
    assert isinstance(error.cause, GracefulHTTPError)
    assert error.cause.http_status == 400
    assert "65536 log probabilities at a time" in str(error)


def test_all_others_get_what_they_ask_for() -> None:
    found = [
        scored(replace(ACME), streams=True, read=True),
        *(scored(who, streams=False) for who in (None, Caller(Role.CLIENT))),
    ]
    assert [len(each) for each in found] == [4, 1, 1]
    assert all(isinstance(output, RequestOutput) for each in found for output in each)


@pytest.mark.parametrize(
    ("path", "fields", "most"),
    [
        ("/v1/embeddings", {}, 1 << 20),
        ("/pooling", {"encoding_format": "float"}, 1 << 20),
        ("/v1/embeddings", {"encoding_format": "base64"}, 16 << 20),
        ("/v2/embed", {"embedding_types": None}, 1 << 20),
        ("/score", {"queries": "a", "documents": "b"}, 64 << 20),
    ],
    ids=["default", "float", "base64", "cohere", "score"],
)
@pytest.mark.parametrize("who", [ACME, Caller(Role.CLIENT), None], ids=["tenant", "client", "none"])
def test_a_tenants_pooling_call_has_few_enough_results_to_tell_them_in_a_moment(
    path: str, fields: dict[str, Any], most: int, who: Caller | None
) -> None:
    processor = OutputProcessor(None, log_stats=False)
    follow(processor, ServerMeter(None))
    caller = None if who is None else replace(who)
    if caller is not None:
        expect_results(caller, path, fields)
    got: list[Any] = []
    used: list[Usage] = []
    for number in range(3):
        request, kind = request_for_acme(REQUEST), RequestOutputKind.FINAL_ONLY
        request.sampling_params, request.pooling_params = None, PoolingParams(task="token_embed")
        request.request_id = str(number)
        queue = RequestOutputCollector(kind, request.request_id)
        processor.add_request(request, None, queue=queue)
        state = processor.request_states[request.request_id]
        prompt = PROMPT_OF.get(state)
        assert prompt is not None
        prompt.caller = caller
        used.append(prompt.usage)
        output = EngineCoreOutput(
            state.request_id,
            [],
            finish_reason=FinishReason.STOP,
            pooling_output=torch.empty(2, most // 4, device="meta"),
        )
        process_outputs(STOCK_OUTPUTS, processor, [output])
        try:
            got.append(queue.get_nowait())
        except GracefulHTTPError as error:
            got.append(error)
    assert all(isinstance(each, PoolingRequestOutput) for each in got[:2])
    if who is not ACME:
        assert isinstance(got[2], PoolingRequestOutput)
        return
    assert isinstance(got[2], GracefulHTTPError)
    assert [usage.status for usage in used] == [Status.OK, Status.OK, Status.FAILED]
    assert f"One call may want {most} numbers in its answer at most" in str(got[2])


def test_an_engine_stops_at_a_request_that_began_with_another_version_than_was_asked_for() -> None:
    """vLLM aborts it, and does not let it go on for a client that has had its answer."""
    log, processor = Log(), OutputProcessor(None, log_stats=False)
    follow(processor, ServerMeter(log))
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "one")
    token = current_call.set(HttpCall({}, asked="1234"))
    try:
        processor.add_request(request_for_acme(REQUEST), None, queue=queue)
    finally:
        current_call.reset(token)
    (state,) = processor.request_states.values()
    output = EngineCoreOutput(state.request_id, [7], trace_headers={VERSION_KEY: "5678" * 16})
    process_outputs(STOCK_OUTPUTS, processor, [output])
    with pytest.raises(InputStreamError, match="version 1234 was asked for") as error:
        queue.get_nowait()
    assert isinstance(error.value.cause, GracefulHTTPError)
    assert error.value.cause.http_status == 409
    processor.abort_requests([state.request_id], internal=True)
    assert [usage.status for usage in log.lines] == [Status.FAILED]


def test_a_call_fails_whose_parts_two_versions_of_its_adapter_have_computed() -> None:
    """Choices or prompts, between which changed files were read again."""
    processor, call = OutputProcessor(None, log_stats=False), HttpCall({})
    follow(processor, ServerMeter(None))
    queues: list[RequestOutputCollector] = []
    for number, digest in enumerate(("1234", "1234", "5678")):
        request = request_for_acme(REQUEST)
        request.request_id = str(number)
        queues.append(RequestOutputCollector(RequestOutputKind.FINAL_ONLY, request.request_id))
        token = current_call.set(call)
        try:
            processor.add_request(request, None, queue=queues[-1])
        finally:
            current_call.reset(token)
        reported = {VERSION_KEY: digest * 16}
        output = EngineCoreOutput(str(number), [7], trace_headers=reported)
        process_outputs(STOCK_OUTPUTS, processor, [output])
    assert [queue.get_nowait() for queue in queues[:2]] == [None, None]
    with pytest.raises(InputStreamError, match="'acme' was reloaded") as error:
        queues[2].get_nowait()
    assert isinstance(error.value.cause, GracefulHTTPError)
    assert error.value.cause.http_status == 503
