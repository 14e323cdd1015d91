"""Times of a layer's call within one graph over many layers, against others and the floor.

    python -m tools.gpu.times [--out times.json] [--dry-run | --rehearse]

Each layer of a graph has weights of its own, so that none is in the cache when its turn comes, and
a replay's constant costs are shared by all. The floor is the time that the least possible work
takes at the card's measured peaks. Cases come in an order in which an early end leaves the widest
view; `GPU_SECONDS` in the environment says when to end.

`--rehearse` needs no card: it takes a few cases of tiny layers through all of that, the kernels in
Triton's interpreter, and writes null where times would stand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tools.kernels
from multilora_kernels.triton_availability import INTERPRET_VARIABLE
from tools.kernels.measure.agreement import TOLERANCES, Expected
from tools.kernels.measure.baselines import BaseLayer
from tools.kernels.measure.batches import LAYERS, BatchSpec, build
from tools.kernels.measure.contenders import Multilora, load_contenders
from tools.kernels.measure.environment import command_arguments, current_environment
from tools.kernels.measure.limits import Peaks, adapter_work, measure_peaks
from tools.kernels.measure.timing import Timer, timer_for

assert tools.kernels  # finds the checkout's kernels
KERNELS = ("shrink_kernel", "combine_kernel", "expand_kernel")
TOKENS = (1, 32, 8, 256, 64)
ACTIVE = (64, 8, 1)
SERVERS: tuple[tuple[int, tuple[Any, ...], tuple[str, ...]], ...] = (
    (64, ("mixed",), tuple(LAYERS)),
    (16, (16,), ("8b.gate_up", "8b.down")),
    (256, (256,), ("8b.gate_up", "8b.down")),
    (64, (16, 64, 8), tuple(LAYERS)),
)
"""Maximum rank of a server, ranks of its adapters, and layers, in the order of the cases."""

_MAX_LAYERS, _ENOUGH_BYTES = 16, 512 << 20  # several times the largest card's L2


@dataclass(frozen=True)
class Scale:
    """How much is done.

    Attributes:
        divisor: Of the layers' widths.
        slots: For adapters.
        cases: At most so many of each of `SERVERS`; None: all.
        layers: Of a graph, at most.
        repetitions: Of each case.
        copied, side: Bytes and matrices of the peaks.
        seconds: For waits on plans, alone and beside copies each.
    """

    divisor: int = 1
    slots: int = 64
    cases: tuple[int, ...] | None = None
    layers: int = _MAX_LAYERS
    repetitions: int = 15
    copied: int = 1 << 30
    side: int = 8192
    seconds: float = 2.0


FULL = Scale()
REHEARSAL = Scale(
    128, 4, cases=(8, 1, 1, 0), layers=2, repetitions=1, copied=1 << 20, side=64, seconds=0.1
)


def cases(scale: Scale = FULL) -> Iterator[BatchSpec]:
    """All cases: batches of one token a request, adapters in turn."""
    seen: set[BatchSpec] = set()
    for number, server in enumerate(SERVERS):
        own = (spec for spec in _cases(server, scale) if spec not in seen)
        for spec in islice(own, scale.cases[number] if scale.cases else None):
            seen.add(spec)
            yield spec


def _cases(
    server: tuple[int, tuple[Any, ...], tuple[str, ...]], scale: Scale
) -> Iterator[BatchSpec]:
    max_rank, ranks_of_adapters, layers = server
    for ranks in ranks_of_adapters:
        for active in ACTIVE:
            for tokens in TOKENS:
                for name in layers:
                    yield BatchSpec(
                        LAYERS[name].scaled(scale.divisor),
                        tokens,
                        "distinct",
                        ranks,
                        max_loras=scale.slots,
                        max_rank=max_rank,
                        active=min(active, tokens, scale.slots),
                    )


def layers_of(spec: BatchSpec, scale: Scale = FULL) -> int:
    """Layers that a graph needs, so that what they read does not stay in the cache."""
    ranks = spec.slot_ranks()[: spec.active]
    bytes_of_one = 2 * int(ranks.sum()) * (spec.layer.inputs + sum(spec.layer.outputs))
    return max(2, min(scale.layers, -(-_ENOUGH_BYTES // max(bytes_of_one, 1))))


def time_case(
    spec: BatchSpec,
    contenders: Sequence[Any],
    timer: Timer,
    peaks: Peaks | None,
    scale: Scale = FULL,
) -> dict[str, Any]:
    """Microseconds of one layer's call by contender; those that fail or are wrong are not timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = [build(spec, device, seed=seed) for seed in range(layers_of(spec, scale))]
    chains: dict[str, Callable[[], None]] = {}
    left_out: dict[str, str] = {}
    for contender in [*contenders, BaseLayer()]:
        try:
            calls = [contender.prepare(batch) for batch in batches]
            if not isinstance(contender, BaseLayer):
                error = Expected(batches[0]).relative_error(calls[0])
                if error > TOLERANCES[batches[0].y.dtype]:
                    left_out[contender.name] = f"wrong: relative error {error:.2g}"
                    continue
        except Exception as reason:  # one that does not run here says nothing of the others
            left_out[contender.name] = _in_words(reason)
            continue

        def chain(calls: Sequence[Callable[[], None]] = tuple(calls)) -> None:
            for call in calls:
                call()

        chains[contender.name] = chain
    times = timer.paired(list(chains.values()), scale.repetitions)
    floor = None
    if peaks is not None:
        work = adapter_work(batches[0])
        floor = 1e6 * max(
            work.bytes / peaks.bytes_per_second, work.operations / peaks.operations_per_second
        )
    microseconds = {
        name: round(median(own) / len(batches), 3) for name, own in zip(chains, times, strict=True)
    }
    return _case(spec, scale, microseconds, floor, left_out)


def _case(
    spec: BatchSpec,
    scale: Scale,
    microseconds: dict[str, float],
    floor: float | None,
    left_out: dict[str, str],
) -> dict[str, Any]:
    return {
        "layer": spec.layer.name,
        "tokens": spec.tokens,
        "adapters": spec.active,
        "ranks": spec.ranks,
        "max_rank": spec.max_rank,
        "layers": layers_of(spec, scale),
        "microseconds": microseconds,
        "floor_microseconds": floor,
        "left_out": left_out,
    }


def _in_words(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {error}"


def plan_waits(device: torch.device, scale: Scale = FULL) -> dict[str, float]:
    """Microseconds until a step's plan has arrived, with and without slots being filled beside."""
    from tools.gpu.stress import SLOTS as STRESS_SLOTS
    from tools.gpu.stress import Filling, mixes

    layer, on_gpu = LAYERS["8b.gate_up"].scaled(scale.divisor), device.type == "cuda"
    spec = BatchSpec(layer, 64, "distinct", max_loras=STRESS_SLOTS)
    batch = build(spec, device)
    plans = mixes(64)

    def waits(until: float) -> list[float]:
        found, turn = [], 0
        while time.monotonic() < until:
            begin = time.perf_counter()
            batch.plan.update(plans[turn % len(plans)])
            if on_gpu:
                torch.cuda.current_stream().synchronize()
            found.append(1e6 * (time.perf_counter() - begin))
            turn += 1
        return sorted(found)

    alone = waits(time.monotonic() + scale.seconds)
    with Filling(batch, None if on_gpu else 1):
        beside = waits(time.monotonic() + scale.seconds)
    return {
        f"{name} {share:.0%}": round(own[int(share * (len(own) - 1))], 1)
        for name, own in (("alone", alone), ("beside copies", beside))
        for share in (0.5, 0.99)
    }


def main(arguments: list[str] | None = None) -> int:
    """Times what there is time for, and writes it after each case; 1 if a case was left out."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.times")
    parser.add_argument("--out", type=Path)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="only list the cases")
    how.add_argument("--rehearse", action="store_true", help="without a card; measures nothing")
    chosen = parser.parse_args(arguments)
    scale = REHEARSAL if chosen.rehearse else FULL
    todo = list(cases(scale))
    if chosen.dry_run:
        for spec in todo:
            print(spec.layer.name, spec.tokens, spec.active, spec.ranks, layers_of(spec))
        return 0
    if chosen.rehearse:
        # Read as Triton is imported: torch's compiler may have done that already.
        if os.environ.get(INTERPRET_VARIABLE) != "1" or torch.cuda.is_available():
            parser.error(
                f"--rehearse needs {INTERPRET_VARIABLE}=1 and an empty CUDA_VISIBLE_DEVICES in the "
                "environment, as run.sh --rehearse has them"
            )
    elif not torch.cuda.is_available():
        print("PyTorch finds no GPU here; --dry-run lists the cases", file=sys.stderr)
        return 2
    from multilora_kernels.triton.compiling.compile_ahead import (
        counted_compilations,  # imports Triton
    )

    end = time.monotonic() + float(os.environ.get("GPU_SECONDS", "480"))
    device = torch.device("cpu" if chosen.rehearse else "cuda")
    timer, others = timer_for(device), load_contenders()
    peaks = measure_peaks(timer, device, torch.bfloat16, scale.copied, scale.side)
    result: dict[str, Any] = {
        **current_environment(device, "tools.gpu.times", command_arguments(arguments)).facts(),
        "measured": not chosen.rehearse,
        "left_out": dict(others.left_out),
        # Names of these kernels that `tools.gpu.compile` had not compiled.
        "compiled_here": [],
        # What vLLM's kernels go by.
        "settings": {k: v for k, v in os.environ.items() if k.startswith("VLLM_")},
        "plan_waits": plan_waits(device, scale),
        "cases": [],
    }
    contenders = [Multilora("triton"), *others.contenders]
    if chosen.rehearse:
        for other in contenders[1:]:
            result["left_out"][other.name] = "takes minutes in the interpreter"
        del contenders[1:]
    for number, spec in enumerate(todo):
        if number and time.monotonic() > end:  # one case there is in any event
            break
        with counted_compilations() as compiled:
            try:
                case = time_case(spec, contenders, timer, peaks, scale)
            except Exception as error:  # such as a lack of memory: other cases need less
                case = _case(spec, scale, {}, None, {contenders[0].name: _in_words(error)})
        result["compiled_here"] += [name for name in compiled if name in KERNELS]
        result["cases"].append(case)
        result["cases_left"] = len(todo) - number - 1
        written = without_figures(result) if chosen.rehearse else result
        print(json.dumps(written["cases"][-1]), flush=True)
        if chosen.out:
            chosen.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return int(any(contenders[0].name in case["left_out"] for case in result["cases"]))


def without_figures(result: dict[str, Any]) -> dict[str, Any]:
    """The result of a rehearsal: the interpreter's times say nothing of a card."""
    cases = [
        {
            **case,
            "microseconds": dict.fromkeys(case["microseconds"]),
            "floor_microseconds": None,
        }
        for case in result["cases"]
    ]
    return {**result, "plan_waits": dict.fromkeys(result["plan_waits"]), "cases": cases}


if __name__ == "__main__":
    sys.exit(main())
