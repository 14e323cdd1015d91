"""First tokens under traffic over many more adapters than slots, by policy: Chameleon's experiment.

SmolLM2-135M in bfloat16 in this process. A hundred adapters of ranks 8 to 128 on q, k, v and o, for
which there are 25 slots and 50 places in host memory. Requests arrive at random (Poisson), at four
rates one after another, the last of which saturates the engine, and name an adapter by a power law
of exponent 1; every arm gets the same requests at the same times, after as many others have filled
its slots. A request's first token counts from when it arrived.

`hits` is the share of requests whose adapter was in a slot when they arrived; `predicted` is what
`vllm-multilora simulate` says of the same trace. Stock vLLM's policy is LRU in both tiers, and its
steps wait for loads; it gets the lowest rate alone, as its kernels cannot answer more.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.engine_loop import (
    Ask,
    ask,
    power_law,
    quantile,
    requests_of,
    serve,
    smollm2,
)
from benchmarks.loads.fleet import WEIGHTS, Fleet
from benchmarks.loads.smollm2 import model_config
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.simulation.replay import ServerShape, simulate

ADAPTERS, SLOTS, HOST_PLACES = 100, 25, 50
RANKS = (8, 16, 32, 64, 128)
PROMPT_TOKENS, NEW_TOKENS = 16, 8
BATCH = 16


@benchmark(
    workload="SmolLM2-135M in bfloat16, requests of 16 + 8 tokens over 100 adapters of ranks 8 to "
    "128 in 25 slots, Poisson arrivals at four rates, the last above what the engine answers",
    control="LRU, with the same requests at the same times; stock vLLM at the lowest rate",
    figure="99th percentile of the time to the first token, and the share of requests that find "
    "their adapter in a slot",
    compares_to="stock vLLM, and what `vllm-multilora simulate` predicts",
    quick={"arms": "lru", "rates": "4", "requests": 8},
)
def cold_traffic(
    arms: str = "lru,gdsf,slru,lfu", rates: str = "1,3,6,12", requests: int = 80
) -> Iterable[Figure]:
    """First tokens under traffic over many more adapters than slots, by policy.

    Args:
        arms: Policies, and `stock`.
        rates: Requests a second.
        requests: At each rate.
    """
    speeds = [float(rate) for rate in rates.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        fleet = Fleet(
            Path(scratch) / "adapters",
            model_config(),
            RANKS[0],
            ("q_proj", "k_proj", "v_proj", "o_proj"),
        )
        dice = random.Random(0)
        ranks = [dice.choice(RANKS) for _ in range(ADAPTERS)]
        folders = [fleet.add(f"adapter-{n}", rank=rank) for n, rank in enumerate(ranks)]
        adapters = requests_of(folders)
        sizes = {path.name: (path / WEIGHTS).stat().st_size for path in folders}
        for arm in arms.split(","):
            own = sorted(speeds)[:1] if arm == "stock" else speeds
            phases = traffic(adapters, own, requests)
            found = run(arm, phases)
            for rate, phase in zip(own, phases[1:], strict=True):
                first = [one.first_token_ms for one in phase]
                case = f"{arm}, {rate:g} requests/s"
                yield Figure(case, "first token, p50, ms", [quantile(first, 0.5)])
                yield Figure(case, "p99, ms", [quantile(first, 0.99)])
            if found is None:
                continue
            yield Figure(f"{arm}, all rates", "hits", [found])
            yield Figure(f"{arm}, all rates", "predicted", [predicted(arm, phases, sizes)])


def traffic(adapters: Sequence[Any], rates: Sequence[float], requests: int) -> list[list[Ask]]:
    """What fills the slots first, and then the requests of each rate."""
    dice = random.Random(1)
    weights = power_law(len(adapters))
    phases = []
    for rate in (float("inf"), *rates):
        moment, phase = 0.0, []
        for adapter in dice.choices(adapters, weights, k=requests):
            one = ask(adapter, PROMPT_TOKENS, NEW_TOKENS, dice)
            moment += dice.expovariate(rate) if rate < float("inf") else 0.0
            one.arrives_s = moment
            phase.append(one)
        phases.append(phase)
    return phases


def run(arm: str, phases: Sequence[Sequence[Ask]]) -> float | None:
    """Serves all phases; the share of hits after the first one, None of stock vLLM."""
    is_stock = arm == "stock"
    settings = {"enabled": False} if is_stock else {"cache_policy": arm}
    with smollm2(
        adapters=SLOTS,
        max_rank=max(RANKS),
        max_cpu_loras=HOST_PLACES,
        max_num_seqs=BATCH,
        additional_config={"multilora": settings},
    ) as llm:
        hits: list[bool] = []
        if is_stock:
            for phase in phases:
                serve(llm, phase, clients=None if phase is not phases[0] else BATCH)
            return None

        kept = llm.llm_engine.engine_core.engine_core.scheduler.adapters
        assert kept is not None

        def look(one: Ask) -> None:
            hits.append(kept.slots.slot_of(one.adapter.lora_int_id) is not None)

        for phase in phases:
            seconds = serve(
                llm, phase, clients=None if phase is not phases[0] else BATCH, arrived=look
            )
            print(f"{arm}: {len(phase)} requests, {seconds:.1f} s", file=sys.stderr, flush=True)
        after = hits[len(phases[0]) :]
        return sum(after) / len(after)


@dataclass(frozen=True)
class _Counted:
    hits: int
    requests: int


def predicted(arm: str, phases: Sequence[Sequence[Ask]], sizes: dict[str, int]) -> float:
    """The share of hits after the first phase that the simulator expects."""

    def counted(names: list[str]) -> _Counted:
        shape = ServerShape(SLOTS, CpuBudget(adapters=HOST_PLACES), concurrency=BATCH // 4)
        outcome = simulate(names, sizes, shape, arm)
        return _Counted(outcome.gpu_hits, outcome.requests)

    names = [[one.adapter.lora_name for one in phase] for phase in phases]
    before, everything = counted(names[0]), counted([name for phase in names for name in phase])
    return (everything.hits - before.hits) / (everything.requests - before.requests)
