"""What a rank-8 tenant pays for the ranks of those whose requests are in its batch.

SmolLM2-135M in bfloat16 in this process. One request of a tenant with an adapter of rank 8, and
beside it seven of others, with adapters of their own on all projections: of rank 8, of rank 128, or
without adapter. All have prompts and answers of the same length, so that all batches have the same
tokens; what counts is the tenant's mean time from token to token while all eight generate, and how
many tokens the others get meanwhile. With fair shares, requests with the large rank are left out of
some steps as soon as their tenants have had three times what the other has had; the first quarter
of the tokens is not counted.

`least` is what no kernel can go below here: beside rank 8, and the time in which the weights that
rank 128 has more are read once, as fast as `cpu_throughput` reads them, on the worker's threads.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.engine_loop import ask, requests_of, serve, smollm2
from benchmarks.loads.fleet import Fleet
from benchmarks.loads.smollm2 import model_config
from benchmarks.steps.cpu_throughput import fastest_dtype, reading_seconds, threads_of

NEIGHBOURS, SMALL, LARGE = 7, 8, 128
PROMPT_TOKENS = 32
ENGINES: dict[str, dict[str, Any]] = {
    "plugin": {},
    "fair shares, slowdown 1.2": {
        "additional_config": {"multilora": {"fair_shares": True, "fair_slowdown": 1.2}}
    },
    "stock": {"additional_config": {"multilora": {"enabled": False}}},
}


@benchmark(
    workload="SmolLM2-135M in bfloat16, one request of a rank-8 tenant beside seven others of "
    "32 + 128 tokens",
    control="the same beside seven rank-8 tenants, in the same engine and round; stock vLLM; the "
    "least that reading the weights takes",
    figure="the tenant's time per output token beside rank-128 tenants, divided by that beside "
    "rank-8 tenants",
    compares_to="the goal, 1.10; stock vLLM",
    quick={"rounds": 1, "stock_rounds": 0, "new_tokens": 8},
)
def interference(rounds: int = 5, stock_rounds: int = 1, new_tokens: int = 128) -> Iterable[Figure]:
    """What a rank-8 tenant pays for the ranks of those whose requests are in its batch."""
    with tempfile.TemporaryDirectory() as scratch:
        fleet = Fleet(Path(scratch) / "adapters", model_config(), SMALL)
        ranks = [SMALL] * (1 + NEIGHBOURS) + [LARGE] * NEIGHBOURS
        folders = [fleet.add(f"adapter-{n}", rank=rank) for n, rank in enumerate(ranks)]
        victim, *others = requests_of(folders)
        beside = {
            "alone": [],
            "seven without adapter": [None] * NEIGHBOURS,
            "seven of rank 8": others[:NEIGHBOURS],
            "seven of rank 128": others[NEIGHBOURS:],
        }
        for name, settings in ENGINES.items():
            count = stock_rounds if name == "stock" else rounds
            if count:
                with smollm2(
                    adapters=len(ranks), max_rank=LARGE, max_num_seqs=8, **settings
                ) as llm:
                    (threads,) = llm.collective_rpc(threads_of)
                    found, of_others = measured(llm, victim, beside, count, new_tokens)
                if name == "plugin":
                    more = NEIGHBOURS * (LARGE - SMALL)
                    reading = 1000 * reading_seconds(model_config(), more, fastest_dtype(), threads)
                    found["seven of rank 128, least"] = [
                        time + reading for time in found["seven of rank 8"]
                    ]
                for kind, times in found.items():
                    case = f"{name}, {kind}"
                    least = found["seven of rank 8"]
                    yield Figure(case, "from token to token, ms", times)
                    ratios = [a / b for a, b in zip(times, least, strict=True)]
                    yield Figure(case, "/ beside rank 8", ratios)
                    if of_others.get(kind):
                        yield Figure(case, "the others' tokens/s", of_others[kind])


def measured(
    llm: Any, victim: Any, beside: dict[str, list[Any]], rounds: int, new_tokens: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """What a victim has in each round, by who is beside it.

    Returns:
        The victim's mean milliseconds from token to token, and the tokens that all the others get
        in a second of these.
    """
    found: dict[str, list[float]] = {kind: [] for kind in beside}
    of_others: dict[str, list[float]] = {kind: [] for kind in beside}
    for number in range(-1, rounds):
        dice = random.Random(number)
        for kind in beside if number % 2 else reversed(beside):
            batch = [victim, *beside[kind]]
            tokens = new_tokens if number >= 0 else 2  # the first brings all into their slots
            asks = [ask(one, PROMPT_TOKENS, tokens, dice) for one in batch]
            serve(llm, asks, clients=len(batch))
            if number >= 0:
                first, *later = asks[0].tokens_s[new_tokens // 4 :]
                last = later[-1]
                found[kind].append(1000 * (last - first) / len(later))
                if others := asks[1:]:
                    got = sum(first < at <= last for one in others for at in one.tokens_s)
                    of_others[kind].append(got / (last - first))
    return found, of_others
