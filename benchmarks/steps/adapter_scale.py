"""Throughput with 5 to 2,000 adapters, as in S-LoRA's experiment.

SmolLM2-135M in bfloat16 in this process, 16 slots, 16 clients that each ask for the next answer
when they have theirs. Which adapter a request names follows a power law of exponent 1 over all
adapters of the set, anew in every round. Adapters have files and bytes of their own, on q, k, v and
o. As in S-LoRA's experiment all that are asked for are in host memory before the clock runs. With
`warm=false` each is read from disk when it is first asked for; every load is then sent twice, and
the figures of the second pass, which reads nothing, are marked `again`.

Sets take turns in one engine, so that all meet the same machine; kept is a set's throughput over
that of the smallest set in the same round. With `ranks=mixed` adapters have ranks 8, 16, 32 and 64.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
from benchmarks.loads.fleet import Fleet
from benchmarks.loads.smollm2 import model_config

SLOTS = CLIENTS = 16
PROMPT_TOKENS, NEW_TOKENS = 64, 32
RANKS = {"8": (8,), "mixed": (8, 16, 32, 64)}


@benchmark(
    workload="SmolLM2-135M in bfloat16, 16 clients with requests of 64 + 32 tokens, a power law "
    "over adapters on q, k, v and o, 16 slots",
    control="the smallest set of adapters, in the same engine and round",
    figure="throughput divided by that with the smallest set",
    compares_to="0.95 from 5 to 2,000 adapters in S-LoRA's paper, on GPUs",
    quick={"sets": "2,20", "rounds": 1, "requests": 16},
    plot="kept throughput",
)
def adapter_scale(
    sets: str = "5,100,1000,2000",
    ranks: str = "8",
    rounds: int = 3,
    requests: int = 64,
    warm: bool = True,
) -> Iterable[Figure]:
    """Throughput with 5 to 2,000 adapters, as in S-LoRA's experiment.

    Args:
        sets: How many adapters there are.
        ranks: `8`, or `mixed` for 8 to 64.
        rounds: Of all sets; one more warms up.
        requests: Of each set in each round.
        warm: Whether adapters are in host memory before they are asked for.
    """
    sizes = [int(size) for size in sets.split(",")]
    passes = ("",) if warm else ("", ", again")
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    firsts: dict[tuple[int, str], list[list[float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        fleet = Fleet(
            Path(scratch) / "adapters",
            model_config(),
            RANKS[ranks][0],
            ("q_proj", "k_proj", "v_proj", "o_proj"),
        )
        adapters = requests_of(
            [
                fleet.add(f"adapter-{n}", rank=RANKS[ranks][n % len(RANKS[ranks])])
                for n in range(max(sizes))
            ]
        )
        with smollm2(
            adapters=SLOTS,
            max_rank=max(RANKS[ranks]),
            max_cpu_loras=max(max(sizes), SLOTS),
            max_num_seqs=CLIENTS,
        ) as llm:
            load = {}
            for number, size in itertools.product(range(-1, rounds), sizes):
                dice = random.Random(f"{number} {size}")
                load[number, size] = asked_for(adapters[:size], requests, dice)
            if warm:
                for number in {one.adapter.lora_int_id for asks in load.values() for one in asks}:
                    llm.llm_engine.add_lora(adapters[number - 1])
            for number in range(-1, rounds):
                for size in sizes if number % 2 else reversed(sizes):
                    for again in passes:
                        asks = [replace(one, tokens_s=[]) for one in load[number, size]]
                        seconds = serve(llm, asks, clients=CLIENTS)
                        said = f"round {number + 1}, {size} adapters{again}: {seconds:.1f} s"
                        print(said, file=sys.stderr)
                        if number >= 0:
                            rates[size, again].append(requests * NEW_TOKENS / seconds)
                            firsts[size, again].append([one.first_token_ms for one in asks])
    for size, again in itertools.product(sizes, passes):
        case, found = f"{size:,} adapters{again}", rates[size, again]
        pairs = zip(found, rates[sizes[0], again], strict=True)
        yield Figure(case, "output tokens/s", found)
        yield Figure(case, "kept throughput", [rate / least for rate, least in pairs])
        medians = [statistics.median(times) for times in firsts[size, again]]
        yield Figure(case, "first token, median, ms", medians)
        p99 = [quantile(times, 0.99) for times in firsts[size, again]]
        yield Figure(case, "p99, ms", p99)
        least = [quantile(times, 0.99) for times in firsts[sizes[0], again]]
        yield Figure(case, "p99 / smallest set's", [a / b for a, b in zip(p99, least, strict=True)])


def asked_for(adapters: Sequence[Any], requests: int, dice: random.Random) -> list[Ask]:
    """Requests for adapters by a power law."""
    chosen = dice.choices(adapters, power_law(len(adapters)), k=requests)
    return [ask(one, PROMPT_TOKENS, NEW_TOKENS, dice) for one in chosen]
