"""Predicts how a server handles a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_multilora.slots.budget import MIB
from vllm_multilora.slots.simulation.traces import TimedTrace, TraceError
from vllm_multilora.toolbox.capacity.calibration import Calibration, CalibrationError
from vllm_multilora.toolbox.capacity.served import PlannedServer, Request, Served
from vllm_multilora.toolbox.capacity.simulated_engine import Engine
from vllm_multilora.wording import listed

_MARGIN = 1.05
"""To what was measured, beyond which a plan is outside the calibration."""


@dataclass(frozen=True)
class Forecast:
    """What is expected; times in seconds.

    Attributes:
        seconds: From the first arrival to the last token.
        generated_per_s: Generated tokens a second; `prompt_per_s` are tokens of prompts.
        busy: The share of the time in which the engine computes.
        first_token_p50: Median time to the first token; `_p99` are 99th percentiles.
        next_token_p50: Median time from one token of a request to its next; 0 if none has two.
        gpu_hit_rate: The share of requests with adapters that find theirs in a slot as they come.
        cpu_hit_rate: That of those that find it there or in host memory.
        outside: What there is more of than was calibrated, for people.
    """

    requests: int
    seconds: float
    generated_per_s: float
    prompt_per_s: float
    busy: float
    first_token_p50: float
    first_token_p99: float
    next_token_p50: float
    next_token_p99: float
    gpu_hit_rate: float
    cpu_hit_rate: float
    loads: int
    activations: int
    outside: tuple[str, ...]


def forecast(
    trace: TimedTrace, sizes: Mapping[str, int], server: PlannedServer, calibration: Calibration
) -> Forecast:
    """Goes through a server's steps for a trace, from empty slots and empty host memory on.

    Requests that name the calibration's model, or nothing, have no adapter; `sizes` are bytes of
    the adapters whose size the trace does not state.

    Raises:
        TraceError: Nobody says an adapter's size, or a request is longer than the model allows.
        CalibrationError: There are adapters, and the calibration has no loads.
        ConfigError: An adapter is larger than host memory.
        PolicyError: There is no such policy.
    """
    known = {**sizes, **trace.sizes}
    names = dict.fromkeys(one.adapter for one in trace.requests if one.adapter is not None)
    numbers = {name: n for n, name in enumerate(n for n in names if n not in calibration.model)}
    for name in numbers:
        if name not in known:
            raise TraceError(
                f"adapter {name!r} is unknown: the calibration has "
                f"{listed(calibration.adapters, 3) or 'no adapter'}, and the base model "
                f"{calibration.model[0]}; give its size in the trace's bytes column, or its "
                "directory with --adapters"
            )
    if numbers and calibration.loads is None:
        raise CalibrationError(
            "the trace has adapters, but the calibration has no times of loads: calibrate a server "
            "that has adapters which nobody has requested yet"
        )
    requested = {name: known[name] for name in numbers}
    server.shape.check_sizes(requested)
    begin, most = trace.requests[0].arrives_s, calibration.settings.max_model_len
    requests = []
    for one in trace.requests:
        if one.prompt_tokens + one.generation_tokens > most:
            raise TraceError(
                f"the request at {one.arrives_s:g} s has {one.prompt_tokens} + "
                f"{one.generation_tokens} tokens, but the calibrated server accepts at most {most}"
            )
        number = None if one.adapter is None else numbers.get(one.adapter)
        arrives = one.arrives_s - begin
        requests.append(Request(arrives, number, one.prompt_tokens, one.generation_tokens))
    served = Engine(server, calibration, [*requested.values()]).serve(requests)
    largest = max(requested.values(), default=0)
    return _summary(requests, served, tuple(_outside(served, largest, calibration)))


def _summary(requests: Sequence[Request], served: Served, outside: tuple[str, ...]) -> Forecast:
    adapted = max(1, sum(request.adapter is not None for request in requests))
    first = sorted(served.first_token_s)
    gaps = sorted((seconds, rows) for seconds, rows in served.steps if rows)
    return Forecast(
        requests=len(requests),
        seconds=served.end_s,
        generated_per_s=sum(r.generation_tokens for r in requests) / served.end_s,
        prompt_per_s=sum(r.prompt_tokens for r in requests) / served.end_s,
        busy=sum(seconds for seconds, _ in served.steps) / served.end_s,
        first_token_p50=first[len(first) // 2],
        first_token_p99=first[int(0.99 * len(first))],
        next_token_p50=_quantile(gaps, 0.5),
        next_token_p99=_quantile(gaps, 0.99),
        gpu_hit_rate=served.gpu_hits / adapted,
        cpu_hit_rate=served.cpu_hits / adapted,
        loads=served.loads,
        activations=served.activations,
        outside=outside,
    )


def _quantile(counted: Sequence[tuple[float, int]], share: float) -> float:
    """The least value that a share of all is not above; values ascend, each with its count."""
    left = share * sum(count for _, count in counted)
    for value, count in counted:
        left -= count
        if left < 0:
            return value
    return 0.0


def _outside(served: Served, largest: int, calibration: Calibration) -> Iterator[str]:
    most, measured = served.most, calibration.ranges
    for what, planned, known in (
        ("tokens of prompts in a step", most["prompt_tokens"], measured.prompt_tokens),
        ("requests in a step", most["rows"], measured.rows),
        ("pairs of prompts' tokens in a step", most["prompt_pairs"], measured.prompt_pairs),
        ("tokens of contexts in a step", most["context_tokens"], measured.context_tokens),
        ("MiB of adapters in a step", most["adapter_bytes"] / MIB, measured.adapter_bytes / MIB),
        ("MiB of an adapter to load", largest / MIB, measured.load_bytes / MIB),
    ):
        if planned > _MARGIN * known:
            yield f"{planned:,.0f} {what}, calibrated up to {known:,.0f}"
    if largest and (doubt := calibration.loads.doubt(largest) if calibration.loads else ""):
        yield f"its times of loads are doubtful: {doubt}"
    cache = calibration.settings.kv_tokens
    if cache is not None and served.most_context > cache:
        yield (
            f"{served.most_context:,} tokens in the KV cache, which holds {cache:,}: vLLM would "
            "preempt requests, and the forecast does not"
        )
