"""The server that is being measured: how its answers are read, and what its loads take."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.calibration import CalibrationError, LoadCosts, Settings
from vllm_multilora.toolbox.capacity.fitting import Sample, line
from vllm_multilora.toolbox.capacity.step_cost import StepBatch
from vllm_multilora.toolbox.clients.completions import Answer, Ask, Completions
from vllm_multilora.toolbox.clients.http_client import UnreachableError
from vllm_multilora.wording import counted

SHORT_PROMPT, STREAMS = 16, 4
"""Tokens of a prompt where it does not matter, and requests beside which something is timed."""

IDLE_LOADS, BESIDE_LOADS, COPIES = 8, 8, 6
"""The most that are timed of each."""

_WARM = 3
_LAG_S, _POLL_S, _MIN_S = 10.0, 0.2, 1e-3


@dataclass(frozen=True)
class Adapter:
    """An adapter as the server lists it: its state as text, and its bytes in host memory, or 0."""

    name: str
    state: str
    bytes: int


@dataclass(frozen=True)
class Timed:
    """A server that nobody else asks.

    Attributes:
        list_adapters: Returns its adapters as they are now.
        source: Where the files of cold adapters lie, as `LoadCosts.source`.
        progress: Called with what is measured next, and with which adapters are left out.
    """

    client: Completions
    model: str
    settings: Settings
    list_adapters: Callable[[], Sequence[Adapter]]
    source: str
    progress: Callable[[str], None]

    def list_with_sizes(self, loaded: Set[str]) -> Sequence[Adapter]:
        """Its adapters once it says the sizes of those that were loaded: its list lags behind."""
        end = time.monotonic() + _LAG_S
        while True:
            listed = self.list_adapters()
            if loaded <= {each.name for each in listed if each.bytes} or time.monotonic() > end:
                return listed
            time.sleep(_POLL_S)

    def alone(self, model: str, prompt: int, times: int) -> list[float]:
        """Seconds to the first tokens of requests one after another."""
        asks = [Ask(model, prompt, 1)] * times
        return [self.client.together([ask])[0].first_token_s for ask in asks]

    def beside(
        self, models: Sequence[str], late: Sequence[Sequence[Ask]]
    ) -> tuple[list[Answer], list[list[Answer]]]:
        """Requests for these models that generate, and others beside them, lot after lot."""
        longest = self.settings.max_model_len - SHORT_PROMPT - 1
        answers = self.client.beside([Ask(m, SHORT_PROMPT, longest) for m in models], late)
        self.client.together([Ask(self.model, SHORT_PROMPT, 1)])  # until the first ones have ended
        return answers


def steps_of(answers: Sequence[Answer]) -> list[tuple[float, float]]:
    """When each step began and ended in which all of the requests got a token.

    Raises:
        CalibrationError: There is none.
    """
    last = max(answers, key=lambda answer: answer.tokens_s[0])
    end = min(answer.tokens_s[-1] for answer in answers)
    steps = [(a, b) for a, b in pairwise(sorted(set(last.tokens_s))) if b <= end]
    if not steps:
        raise CalibrationError(
            f"{counted(len(answers), 'request')} sent together got no tokens in the same steps: "
            "the server has other traffic, or runs fewer at once than --max-num-seqs says"
        )
    return steps


def time_loads(server: Timed) -> tuple[LoadCosts | None, list[Sample]]:
    """Asks for adapters that nobody has asked for, some beside requests that generate.

    Returns:
        What loads take, None if no adapter is cold; and the steps beside loads.
    """
    cold = [adapter.name for adapter in server.list_adapters() if adapter.state == "absent"]
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
                server.progress(f"no load of {name}: {error}")
        return found

    first = timed(idle, lambda name: _first_beyond(server, name))
    late = timed(beside, lambda name: _beside(server, name, samples))
    listed = server.list_with_sizes({name for name, _ in (*first, *late)})
    mib = {each.name: each.bytes / MIB for each in listed if each.bytes}
    # Those that lost their slots to the others.
    copied = [each.name for each in listed if each.state == "host"][:COPIES]
    copies = timed(copied, lambda name: _first_beyond(server, name))

    def by_size(times: Sequence[tuple[str, float]]) -> list[tuple[float, float]]:
        return [(mib[name], seconds) for name, seconds in times if name in mib]

    if not by_size(first):
        return None, samples
    copy_fixed, copy_slope = line(by_size(copies)) if by_size(copies) else (0.0, 0.0)
    found = [(x, max(0.0, y - copy_fixed - copy_slope * x)) for x, y in by_size(first)]
    fixed, slope = line(found)
    found_beside = by_size(late) or found
    beside_fixed, beside_slope = line(found_beside)
    off = [y / max(fixed + slope * x, _MIN_S) - 1 for x, y in found]
    off += [y / max(beside_fixed + beside_slope * x, _MIN_S) - 1 for x, y in found_beside]
    costs = LoadCosts(
        fixed_s=fixed,
        s_per_mib=slope,
        beside_fixed_s=beside_fixed,
        beside_s_per_mib=beside_slope,
        copy_fixed_s=copy_fixed,
        copy_s_per_mib=copy_slope,
        source=server.source,
        measured=len(found) + len(by_size(late)),
        spread=math.sqrt(statistics.mean(each**2 for each in off)),
    )
    return costs, samples


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
    models = [server.model] * min(STREAMS, server.settings.max_num_seqs - 1)
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
