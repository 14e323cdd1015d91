"""Predicts how a server handles a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import MIB
from vllm_multilora.slots.simulation.replay import ServerShape
from vllm_multilora.slots.simulation.traces import TimedTrace, TraceError
from vllm_multilora.toolbox.capacity.calibration import Calibration, CalibrationError
from vllm_multilora.toolbox.capacity.served import Costs, Request, Served
from vllm_multilora.toolbox.capacity.simulated_engine import Engine
from vllm_multilora.toolbox.capacity.step_cost import StepCost
from vllm_multilora.wording import listed

_MARGIN = 1.05
"""To what was measured, beyond which a plan is outside the calibration."""


@dataclass(frozen=True)
class PlannedServer:
    """The server to plan.

    Attributes:
        shape: Slots, host memory, and `--max-num-seqs` as `concurrency`.
        max_num_batched_tokens: The most tokens of a step.
        policy: The name of the cache policy.

    Raises:
        ConfigError: A step has fewer tokens than a batch has requests.
    """

    shape: ServerShape
    max_num_batched_tokens: int
    policy: str = "lru"

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.shape.concurrency:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is less than "
                f"--max-num-seqs {self.shape.concurrency}, which vLLM refuses: each running "
                "request gets a token in each step"
            )


@dataclass(frozen=True)
class Forecast:
    """What is expected; times in seconds.

    Attributes:
        requests: Of the trace.
        seconds: From the first arrival to the last token.
        generated_per_s: Generated tokens a second, over these seconds.
        prompt_per_s: Tokens of prompts, likewise.
        busy: The share of these seconds in which the engine computes.
        first_token_p50: Median time to the first token.
        first_token_p99: Its 99th percentile.
        next_token_p50: Median time from one token of a request to its next.
        next_token_p99: Its 99th percentile; 0, as the median, if every request has one token.
        gpu_hit_rate: The share of requests with adapters that find theirs in a slot as they come.
        cpu_hit_rate: That of those that find it there or in host memory.
        loads: Loads of adapters.
        activations: Copies into slots.
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

    Args:
        trace: The requests. Those that name the calibration's model, or nothing, have no
            adapter.
        sizes: Bytes of the adapters that the trace does not state.
        server: What serves them.
        calibration: What things take there.

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
    server.shape.check_sizes({name: known[name] for name in numbers})
    begin = trace.requests[0].arrives_s
    requests = []
    for one in trace.requests:
        most, tokens = calibration.settings.max_model_len, one.prompt_tokens + one.generation_tokens
        if tokens > most:
            raise TraceError(
                f"the request at {one.arrives_s:g} s has {one.prompt_tokens} + "
                f"{one.generation_tokens} tokens, but the calibrated server accepts at most {most}"
            )
        number = None if one.adapter is None else numbers.get(one.adapter)
        arrives = one.arrives_s - begin
        requests.append(Request(arrives, number, one.prompt_tokens, one.generation_tokens))
    costs = Costs(
        StepCost(calibration.step_s),
        calibration.request_s,
        calibration.request_beside_s,
        calibration.loads,
    )
    engine = Engine(
        server.shape,
        server.max_num_batched_tokens,
        server.policy,
        costs,
        [known[name] for name in numbers],
    )
    served = engine.serve(requests)
    largest = max((known[name] for name in numbers), default=0)
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
    cache = calibration.settings.kv_tokens
    if cache is not None and served.most_context > cache:
        yield (
            f"{served.most_context:,} tokens in the KV cache, which holds {cache:,}: vLLM would "
            "preempt requests, and the forecast does not"
        )
