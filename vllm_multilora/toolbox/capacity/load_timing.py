"""Measures how long a server takes to load adapters, and to copy them into slots."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.calibration import LoadCosts
from vllm_multilora.toolbox.capacity.fitting import Sample, line
from vllm_multilora.toolbox.capacity.step_cost import StepBatch
from vllm_multilora.toolbox.capacity.timing import SHORT_PROMPT, STREAMS, Adapter, Timed, steps_of
from vllm_multilora.toolbox.clients.completions import Ask
from vllm_multilora.toolbox.clients.http_client import UnreachableError

IDLE_LOADS, BESIDE_LOADS, COPIES = 8, 8, 6
"""The most that are timed of each."""

_WARM = 3


def time_loads(
    server: Timed,
    list_adapters: Callable[[], Sequence[Adapter]],
    source: str,
    progress: Callable[[str], None],
) -> tuple[LoadCosts | None, list[Sample]]:
    """Asks for adapters that nobody has asked for, some beside requests that generate.

    Args:
        server: The server.
        list_adapters: Its adapters now.
        source: Where their files lie, as `LoadCosts.source`.
        progress: Is told which adapters are left out.

    Returns:
        What loads take, None if no adapter is cold; and the steps beside loads.
    """
    cold = [adapter.name for adapter in list_adapters() if adapter.state == "absent"]
    beside = (cold[2::3] or cold[1:2])[:BESIDE_LOADS]  # neither all large nor all small ones
    idle = [name for name in cold if name not in beside][:IDLE_LOADS]
    samples: list[Sample] = []

    def timed(names: Sequence[str], time: Callable[[str], float]) -> list[tuple[str, float]]:
        # Some answer no prompt of random tokens, or cannot be loaded.
        found = []
        for name in names:
            try:
                found.append((name, time(name)))
            except UnreachableError as error:
                progress(f"no load of {name}: {error}")
        return found

    first = timed(idle, lambda name: _first_beyond(server, name))
    late = timed(beside, lambda name: _beside(server, name, samples))
    # Those that lost their slots to the others.
    copied = [adapter.name for adapter in list_adapters() if adapter.state == "host"][:COPIES]
    copies = timed(copied, lambda name: _first_beyond(server, name))
    mib = {adapter.name: adapter.bytes / MIB for adapter in list_adapters() if adapter.bytes}

    def by_size(times: Sequence[tuple[str, float]]) -> list[tuple[float, float]]:
        return [(mib[name], seconds) for name, seconds in times if name in mib]

    if not by_size(first):
        return None, samples
    copy_fixed, copy_slope = line(by_size(copies)) if by_size(copies) else (0.0, 0.0)
    found = [(x, max(0.0, y - copy_fixed - copy_slope * x)) for x, y in by_size(first)]
    fixed, slope = line(found)
    beside_fixed, beside_slope = line(by_size(late) or found)
    loads = LoadCosts(
        fixed_s=fixed,
        s_per_mib=slope,
        beside_fixed_s=beside_fixed,
        beside_s_per_mib=beside_slope,
        copy_fixed_s=copy_fixed,
        copy_s_per_mib=copy_slope,
        source=source,
        measured=len(found) + len(by_size(late)),
    )
    return loads, samples


def _first_beyond(server: Timed, name: str) -> float:
    """Seconds by which an adapter's first request is later answered than the next ones."""
    first, *warm = server.alone(name, SHORT_PROMPT, times=1 + _WARM)
    return max(0.0, first - statistics.median(warm))


def _beside(server: Timed, name: str, samples: list[Sample]) -> float:
    """Seconds of a load while others generate; notes the steps beside it.

    Beyond what the later ones wait for, its first request waits for the end of the step in which
    the load ends, on average half of one; for the next, during which it reaches the scheduler; and
    for a step in which it is copied.
    """
    models = [server.model] * min(STREAMS, server.limits.max_num_seqs - 1)
    late = [[Ask(name, SHORT_PROMPT, 1)]] * (1 + _WARM)
    streams, ((cold,), *warm) = server.beside(models, late)
    later = statistics.mean(answer.first_token_s for (answer,) in warm)
    steps = list(enumerate(steps_of(streams), 1))
    usual = statistics.median(end - begin for _, (begin, end) in steps)
    for age, (begin, end) in steps:
        if begin >= cold.begin_s and end < cold.tokens_s[0] - 3 * usual:
            context = len(streams) * (SHORT_PROMPT + age)
            batch = StepBatch(rows=len(streams), context_tokens=context, is_loading=True)
            samples.append(Sample("beside loads", batch, end - begin))
    return max(0.0, cold.first_token_s - later - 2.5 * usual)
