"""Follows every prompt in an API server to its end, and records what it used and what ran it.

It counts what the answers' `usage` counts, in the process that answers: tokens that the engine
computed after a stop string are left out, and a prompt with several choices counts once. A beam
search is many requests to the engine, and each of them counts. What was preempted counts once, and
what was aborted counts as far as it got.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.async_llm import InputStreamError

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.integration.api_server.failure_delivery import ON_OUTPUTS
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine.requests.weight_versions import parts_in, version_in
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.requests.engine_calls import STOP, stopped
from vllm_multilora.integration.server.requests.http_calls import (
    SHOWN_DIGITS,
    HttpCall,
    current_call,
)
from vllm_multilora.metering.usage_log import Status, Usage, UsageLog
from vllm_multilora.metrics.label_values import BLENDS
from vllm_multilora.metrics.server_counts import COUNTS
from vllm_multilora.slots.budget import MIB
from vllm_multilora.tenants.limits import stop_waiting

logger = logging.getLogger(__name__)

METER: Attached[ServerMeter] = Attached("meter")
"""What follows the requests of an API server's `OutputProcessor` to their ends."""

PROMPT: Attached[Prompt | None] = Attached("prompt")
"""What the prompt of a `RequestState`, or of the `ParentRequest` of several, has used so far; None
once it has ended."""

_PROMPT_NUMBER = re.compile(r"-(\d+)$")
"""At the end of the id of a request for completions, which may have several prompts."""

_ENDS = {FinishReason.ABORT: Status.ABORTED, FinishReason.ERROR: Status.FAILED}


@dataclass
class Prompt:
    """One prompt on its way.

    Attributes:
        usage: What it has used so far.
        call: The HTTP request that it came with.
        caller: Who sent that, and counts its answers; None where no keys are set.
        choices: Those that have not ended.
    """

    usage: Usage
    call: HttpCall | None
    caller: Caller | None
    choices: int = 0


class ServerMeter:
    """Follows one API server's prompts, on its event loop.

    Args:
        log: Takes a line for each; None where there is no log.
        has_latencies: Whether the latencies of each adapter's requests are counted.
    """

    def __init__(self, log: UsageLog | None, *, has_latencies: bool = False) -> None:
        self._log = log
        self._has_latencies = has_latencies
        self._is_delivering = False

    def begin(self, state: Any) -> None:
        """A choice begins; its state is vLLM's `RequestState`."""
        parent = state.parent_req
        prompt = None if parent is None else PROMPT.get(parent)
        if prompt is None:
            request_id = (state if parent is None else parent).external_req_id
            call, caller, lora = current_call.get(), current_caller.get(), state.lora_request
            usage = Usage(
                request_id,
                adapter=None if lora is None else lora.lora_name,
                is_blend=lora is not None and is_blend(lora.lora_path),
                route=None if call is None else call.route,
                tenant=caller.tenant.name if caller is not None and caller.tenant else None,
            )
            prompt = Prompt(usage, call, caller)
            if parent is not None:
                PROMPT.set(parent, prompt)
        prompt.choices += 1
        PROMPT.set(state, prompt)

    @contextmanager
    def look(self, outputs: Iterable[Any], states: dict[str, Any]) -> Iterator[None]:
        """Takes in what engines say of versions, results and ends, before vLLM does.

        Requests that end within the block have ended by themselves; others are aborted. Outputs are
        vLLM's `EngineCoreOutput`s, states its request states by internal request id.
        """
        self._take(outputs, states)
        self._is_delivering = True
        try:
            yield
        finally:
            self._is_delivering = False

    def _take(self, outputs: Iterable[Any], states: dict[str, Any]) -> None:
        for output in outputs:
            if (
                output.finish_reason is None
                and output.trace_headers is None
                and output.new_logprobs is None
            ):
                continue  # it has tokens only, as most have
            state = states.get(output.request_id)
            prompt = None if state is None else PROMPT.get(state)
            if prompt is None:
                continue
            if (digest := version_in(output.trace_headers)) is not None:
                self._ran(prompt, digest, state, tells=bool(parts_in(output.trace_headers)))
            if prompt.caller is not None:
                try:
                    _bound_scores(prompt.caller, output, state)
                except GracefulHTTPError as error:
                    _refuse(prompt, state, error)
                    if output.pooling_output is not None:
                        output.pooling_output = output.pooling_output[:0]
            if (status := _ENDS.get(output.finish_reason)) is not None:
                prompt.usage.status = status

    def _ran(self, prompt: Prompt, digest: str, state: Any, *, tells: bool) -> None:
        prompt.usage.version = digest
        call = prompt.call
        if call is None:
            return
        first = call.ran = call.ran or digest
        if tells:
            number = _PROMPT_NUMBER.search(prompt.usage.request_id)
            before = int(number[1]) if number and call.path.endswith("/v1/completions") else 0
            call.parts[before * (state.n or 1) + state.request_index] = state
        if state.queue is None:
            return
        if not digest.startswith(call.asked):
            error = GracefulHTTPError(
                f"The model `{prompt.usage.adapter}` has become version "
                f"{digest[:SHOWN_DIGITS]}; version {call.asked} was asked for.",
                HTTPStatus.CONFLICT,
            )
            _refuse(prompt, state, error)
        elif digest != first and not tells:
            _refuse(prompt, state, replaced(str(prompt.usage.adapter)))

    def end(self, state: Any) -> None:
        """A choice has ended; ending it again is no matter."""
        prompt = PROMPT.get(state)
        if prompt is None:
            return
        # A client may send a request's input in parts, and say late that the last one was its last.
        is_over = state.streaming_input and state.input_chunk_queue is None
        PROMPT.set(state, None)
        prompt.choices -= 1
        usage = prompt.usage
        if not (self._is_delivering or is_over) and usage.status is Status.OK:
            usage.status = Status.ABORTED
        if prompt.caller is not None:
            prompt.caller.answered()
        tokens = 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
        usage.generated_tokens += tokens
        if self._has_latencies and usage.adapter is not None:
            _count_latencies(BLENDS if usage.is_blend else usage.adapter, state.stats)
        if tokens or (usage.status is Status.OK and not state.is_prefilling):
            usage.prompt_tokens = state.prompt_len
            if state.request_index == 0:
                usage.cached_tokens = state.num_cached_tokens
        if not prompt.choices:
            self.count(usage)

    def count(self, usage: Usage) -> None:
        if usage.adapter is not None:
            COUNTS.count_tokens(usage)
        if self._log is not None:
            self._log.write(usage)


def _bound_scores(caller: Caller, output: Any, state: Any) -> None:
    """Counts what a call is told in one piece: the results of pooling, or log probabilities.

    Raises:
        GracefulHTTPError: They are too many to be told in a moment.
    """
    if state.queue is None:
        return
    if output.pooling_output is not None:
        caller.count_results(output.pooling_output.numel())
    is_whole = state.output_kind is RequestOutputKind.FINAL_ONLY  # else its answer is streamed
    if output.new_logprobs is not None and is_whole:
        most = state.logprobs_processor.num_logprobs
        width = output.new_logprobs.logprobs.shape[1] if most < 0 else most + 1  # -1: all that are
        caller.count_scores(len(output.new_token_ids) * width)


def replaced(adapter: str) -> GracefulHTTPError:
    """What a call fails with of which another version of its adapter has computed a part."""
    return GracefulHTTPError(
        f"adapter {adapter!r} was reloaded or unloaded while this request was being answered; "
        "send it again",
        HTTPStatus.SERVICE_UNAVAILABLE,
    )


def _refuse(prompt: Prompt, state: Any, error: GracefulHTTPError) -> None:
    """Has the reader of a request get an error before any output, and the engine stop at it."""
    prompt.usage.status = Status.FAILED
    # vLLM aborts what generates only if its input is said to be wrong. What pools has ended.
    state.queue.put(error if state.detokenizer is None else InputStreamError(error))


def _count_latencies(adapter: str, stats: Any) -> None:
    """Counts what vLLM has measured of a choice; nothing if it had no token, or is not measured."""
    if stats is None or not stats.first_token_ts:
        return
    others = stats.num_generation_tokens - 1
    pace = (stats.last_token_ts - stats.first_token_ts) / others if others > 0 else None
    # From the arrival by the wall clock, which may have been set back: a sum never shrinks.
    COUNTS.count_latencies(adapter, max(stats.first_token_latency, 0.0), pace)


def start(models: Any) -> None:
    """Meters a server's requests from now on.

    Raises:
        ConfigError: The usage log cannot be written to.
    """
    client = models.engine_client
    settings = settings_of(client.vllm_config)
    log = None
    if settings.usage_log is not None:
        most = round(settings.usage_log_mib * MIB)
        log = UsageLog(Path(settings.usage_log), most, on_dropped=COUNTS.count_dropped)
        atexit.register(log.close)
    attach(client.output_processor, ServerMeter(log, has_latencies=settings.latency_metrics))


def attach(processor: Any, meter: ServerMeter) -> None:
    """Has a meter follow the requests of vLLM's `OutputProcessor`."""
    METER.set(processor, meter)
    ON_OUTPUTS.set(processor, meter.look)


def end_all_at_shutdown(client: Any) -> None:
    """Has all requests end when a server is stopped that cuts them off, or its engine has died.

    vLLM cancels the task that would tell their readers, and the server would wait for these; or it
    answers as if they were complete, or with the death of an engine that it has ended itself.
    """
    processor = client.output_processor

    def end_all(*, is_known: bool = False) -> None:
        if (meter := METER.get(processor)) is not None:
            for state in processor.request_states.values():
                meter.end(state)
        if not is_known:
            processor.propagate_error(stopped())
        stop_waiting()

    client.output_handler.add_done_callback(lambda each: end_all(is_known=not each.cancelled()))
    if not client.vllm_config.shutdown_timeout:
        STOP.act = partial(asyncio.get_running_loop().call_soon_threadsafe, end_all)
