"""Counts what these kernels and others do for the same batches, without a GPU.

    python -m tools.kernels.work [--case "decode, mixed"] [--json]

Bytes loaded and stored, programs and kernel launches, each counted while the kernels run in
Triton's interpreter; see `measure.counted.counting`. The others are vLLM's own kernels, where vLLM
is installed. A count says how much there is to do, not how long a GPU takes for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from multilora_kernels import reference, triton_availability
from multilora_kernels.triton_availability import INTERPRET_VARIABLE, TritonUnavailableError
from tools.kernels.measure.agreement import TOLERANCES
from tools.kernels.measure.batches import LAYERS, BatchSpec, LayerBatch, build
from tools.kernels.measure.contenders import (
    Contender,
    ContenderUnavailableError,
    Multilora,
    by_column,
    load_contenders,
)

if TYPE_CHECKING:
    from tools.kernels.measure.counted.counting import Work

DTYPE = torch.float16  # the interpreter computes with it; bfloat16 takes as many bytes
ARCHITECTURE, PROCESSORS = "sm_90", 132
"""The device whose blocks and grids these kernels take: an H100. vLLM's are the same on all."""

_O, _QKV = LAYERS["8b.o"], LAYERS["8b.qkv"]
CASES: dict[str, BatchSpec] = {
    "decode, mixed ranks": BatchSpec(_O, 16, "distinct", "mixed", max_loras=16),
    "decode, mixed ranks, qkv": BatchSpec(_QKV, 4, "distinct", "mixed", max_loras=4),
    "decode, 8 of 64 slots": BatchSpec(_O, 16, "distinct", "mixed", max_loras=64, active=8),
    "decode, rank 64": BatchSpec(_O, 8, "distinct", 64, max_loras=8),
    "prefill, mixed ranks": BatchSpec(_O, 256, "distinct", "mixed", max_loras=4, run_length=64),
    "prefill, mixed ranks, qkv": BatchSpec(
        _QKV, 1088, "distinct", "mixed", max_loras=4, run_length=272
    ),
    "no adapter": BatchSpec(_O, 16, "distinct", "mixed", max_loras=16, active=0),
}
"""Layers at their full size. Most batches are small, for the interpreter takes milliseconds for a
program: with more tokens and adapters all counts grow. The longest is one that fills the device
without cutting K."""


@dataclass(frozen=True)
class Counted:
    """What one contender did for one batch.

    Attributes:
        contender: Its name.
        work: The counts.
        error: Root mean square error of its result, relative to the adapters' part of y.
    """

    contender: str
    work: Work
    error: float


def count_contender(contender: Contender, batch: LayerBatch) -> Counted:
    """Runs one contender on a batch, counts, and checks what it computed.

    Raises:
        ContenderUnavailableError: It cannot run here.
        RuntimeError: Its result is wrong, so that its counts would mean nothing.
    """
    # Here and not above: Triton is not always installed.
    from multilora_kernels.triton.launch import DeviceFacts
    from tools.kernels.measure.counted.counting import count_work
    from tools.kernels.measure.counted.interpreter import launched_as_on

    own = batch.with_output(batch.y.clone())
    if isinstance(contender, Multilora):
        own = by_column(own)
    with launched_as_on(DeviceFacts(ARCHITECTURE, PROCESSORS, pdl=False)):
        work = count_work(contender.prepare(own), own)
    error = _relative_error(own.y, batch)
    if not error <= TOLERANCES[DTYPE]:
        raise RuntimeError(
            f"{contender.name} is off by {error:.1e} (relative RMS, at most "
            f"{TOLERANCES[DTYPE]:.0e} is rounding) for {describe(batch.spec)}"
        )
    return Counted(contender.name, work, error)


def _relative_error(found: torch.Tensor, batch: LayerBatch) -> float:
    right = batch.y.double()
    slots = batch.token_slots.tolist()
    x = batch.x.double()
    reference.lora_linear(right, x, batch.lora_a, batch.lora_b, batch.ranks, slots)
    size: float = (right - batch.y.double()).norm().item()
    error: float = (found.double() - right).norm().item()
    return error / size if size else error


def required_weight_bytes(batch: LayerBatch) -> int:
    """Bytes of A and B up to the true ranks of the batch's adapters; computed, not counted."""
    active = sorted({slot for slot in batch.token_slots.tolist() if slot >= 0})
    sides = sum(a.size(-1) + b.size(-2) for a, b in zip(batch.lora_a, batch.lora_b, strict=True))
    return int(batch.spec.slot_ranks()[active].sum()) * sides * batch.lora_a[0].element_size()


def describe(spec: BatchSpec) -> str:
    """The sizes of a batch in words."""
    layer = spec.layer
    in_use = spec.max_loras if spec.active is None else spec.active
    ranks = "ranks 8, 16, 32, 64" if spec.ranks == "mixed" else f"rank {spec.ranks}"
    return (
        f"{layer.name} ({layer.inputs} -> {' + '.join(map(str, layer.outputs))}), "
        f"{spec.tokens} tokens in requests of {spec.run_length}, {in_use} of {spec.max_loras} "
        f"slots in use, {ranks} of at most {spec.max_rank}, {str(DTYPE).removeprefix('torch.')}"
    )


_ROWS: dict[str, Callable[[Work], int]] = {
    "kernel launches": lambda work: work.kernels,
    "programs": lambda work: work.programs,
    "- that load weights": lambda work: work.with_weights,
    "- that store only": lambda work: work.programs - work.with_weights - work.exited,
    "- that exit at once": lambda work: work.exited,
    "weights loaded": lambda work: work.traffic["weights"].loaded,
    "weights, each byte once": lambda work: work.traffic["weights"].touched,
    "weights, 32-byte sectors": lambda work: work.traffic["weights"].sectors,
    "activations loaded": lambda work: work.traffic["activations"].loaded,
    "activations stored": lambda work: work.traffic["activations"].stored,
    "intermediate loaded": lambda work: work.traffic["intermediate"].loaded,
    "intermediate stored": lambda work: work.traffic["intermediate"].stored,
    "intermediate cleared": lambda work: work.cleared,
    "metadata loaded": lambda work: work.traffic["metadata"].loaded,
}


def table(results: Sequence[Counted]) -> str:
    """The counts of one case in Markdown, the first contender's over each other's as ratios."""
    first, *others = results
    heads = [first.contender] + [head for r in others for head in (r.contender, "ratio")]
    lines = [f"| | {' | '.join(heads)} |", "|---" + "|---:" * len(heads) + "|"]
    for label, value in _ROWS.items():
        own = value(first.work)
        cells = [f"{own:,}"]
        for other in others:
            theirs = value(other.work)
            cells += [f"{theirs:,}", f"{own / theirs:.3f}" if theirs else "-"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _record(case: str, spec: BatchSpec, counted: Counted) -> dict[str, Any]:
    return {
        "case": case,
        "contender": counted.contender,
        "batch": asdict(spec),
        "dtype": str(DTYPE).removeprefix("torch."),
        **asdict(counted.work),
        "error": counted.error,
    }


def main(arguments: list[str] | None = None) -> int:
    """Counts the chosen cases; returns 2 where that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.kernels.work",
        description=__doc__,
    )
    parser.add_argument("--case", action="append", help="only cases that begin with this")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = sys.argv[1:] if arguments is None else arguments
    chosen = parser.parse_args(given)
    prefixes = tuple(chosen.case or [""])
    cases = {name: spec for name, spec in CASES.items() if name.startswith(prefixes)}
    if not cases:
        parser.error(f"no case begins so; there are: {'; '.join(CASES)}")
    if os.environ.get(INTERPRET_VARIABLE) != "1":
        # Triton reads the variable as it is imported, and torch's compiler has imported it.
        command = [sys.executable, "-m", "tools.kernels.work", *given]
        return subprocess.run(command, env={**os.environ, INTERPRET_VARIABLE: "1"}).returncode
    try:
        triton_availability.require("cpu")
    except TritonUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    with redirect_stdout(sys.stderr):  # what vLLM prints as it is imported
        entered = load_contenders()
    for name, reason in entered.left_out:
        print(f"{name} is left out: {reason}", file=sys.stderr)
    for name, spec in cases.items():
        _run_case(name, spec, (Multilora(), *entered.contenders), as_json=chosen.json)
    return 0


def _run_case(
    name: str, spec: BatchSpec, contenders: Sequence[Contender], *, as_json: bool
) -> None:
    batch = build(spec, dtype=DTYPE)
    results = []
    for contender in contenders:
        try:
            with redirect_stdout(sys.stderr):
                results.append(count_contender(contender, batch))
        except ContenderUnavailableError as error:
            print(f"{contender.name} is left out: {error}", file=sys.stderr)
    if as_json:
        for result in results:
            print(json.dumps(_record(name, spec, result)), flush=True)
        return
    print(f"### {name}\n\n{describe(spec)}.")
    print(f"The ranks in use have {required_weight_bytes(batch):,} bytes of weights.")
    print(f"Bytes and counts per layer call:\n\n{table(results)}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
