"""Shows the kernels' main loops in decoding, as the compiler scheduled them; needs no GPU.

    python -m tools.kernels.loops [--arch 90] [--write]

For servers of several highest ranks, and for each range of adapters' ranks: what one warp issues
in a pass. `--write` puts the table into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from tools.kernels.measure.batches import LAYERS
from tools.kernels.measure.compiled.sass import Counts, disassemble
from tools.kernels.measure.tuned.launch_cases import LaunchCase, launches, table_name
from tools.kernels.report import Compiled, compile_launch

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
ARCHITECTURES = ("80", "89", "90", "100", "120")
CASES = tuple(
    LaunchCase(layer.name, layer.inputs, layer.outputs, max_rank, tokens=8, by_column=True)
    for max_rank, layer in (
        (16, LAYERS["8b.qkv"]),
        (16, LAYERS["8b.gate_up"]),
        (32, LAYERS["8b.gate_up"]),
        (64, LAYERS["8b.gate_up"]),
        (256, LAYERS["8b.gate_up"]),
    )
)
"""Short batches, with B as it lies in the plugin's slots."""

_TABLE = re.compile(r"(?<=<!-- loops -->\n).*?(?=<!-- end -->)", re.S)
_LOAD_BYTES, _ITEM_BYTES = 16, 2


@dataclass(frozen=True)
class Loop:
    """One main loop.

    Attributes:
        layer: The layer's name.
        kernel: `shrink` or `expand`.
        max_rank: The server's highest rank.
        rank: The highest rank of the adapters that it is for.
        columns: Columns of x (shrink) or of y (expand) that a program takes in a pass.
        steps: Steps in a pass.
        counts: What one of the program's warps issues in a pass.
        weight_bytes: Of A or B, what the programs of a multiprocessor load in a step; none in a
            last single step, whose block of B the passes of two before it have loaded.
    """

    layer: str
    kernel: str
    max_rank: int
    rank: int
    columns: int
    steps: int
    counts: Counts
    weight_bytes: int


def main_loops(case: LaunchCase, architecture: str) -> Iterator[Loop]:
    """The main loops of both halves.

    Args:
        case: A layer under a short batch, of 16-bit values.
        architecture: One of `ARCHITECTURES`.

    Raises:
        RuntimeError: The machine code has other loops than the kernels.
    """
    for launch in launches(case, architecture):
        compiled = compile_launch(case.title, launch, architecture)
        found = disassemble(compiled.cubin).main_loops()
        kernel, block_r = compiled.kernel, compiled.constants["BLOCK_R"]
        # One for each power of two, from the highest down; shrink repeats its widest block.
        ranks = [min(case.max_rank, block_r) if kernel == "shrink" else case.max_rank]
        while ranks[-1] > 16:
            ranks.append(ranks[-1] // 2)
        # Where a pass has two steps, a loop for a last single step comes behind it.
        loops_each, rest = divmod(len(found), len(ranks))
        if rest or loops_each not in (1, 2):
            raise RuntimeError(
                f"{kernel} for {case.title}: one or two loops with tensor-core instructions were "
                f"expected in its machine code for each of {len(ranks)} ranges of ranks, "
                f"{len(found)} are there"
            )
        for number, counts in enumerate(found):
            rank, is_last = ranks[number // loops_each], number % loops_each == 1
            loaded, steps = (0, 1) if is_last else (rank, loops_each)
            columns = _columns(compiled, counts, loaded)
            weight_bytes = _ITEM_BYTES * loaded * columns // steps * compiled.per_processor
            yield Loop(case.name, kernel, case.max_rank, rank, columns, steps, counts, weight_bytes)


def _columns(compiled: Compiled, counts: Counts, weights: int) -> int:
    """Columns that a program takes in a pass, by its loads.

    Args:
        compiled: The kernel.
        counts: What a warp issues in a pass.
        weights: How many are loaded for each column; besides, a value for each row of x or y is.
    """
    loaded = counts.wide_loads * _LOAD_BYTES * compiled.threads
    columns, rest = divmod(loaded, _ITEM_BYTES * (weights + compiled.constants["BLOCK_M"]))
    if rest:
        raise RuntimeError(
            f"{compiled.kernel} for {compiled.case}: {counts.wide_loads} loads of 16 bytes, with "
            f"{weights} weights for each column, are no whole number of columns"
        )
    return columns


def table(architecture: str) -> Iterator[str]:
    """The main loops of all cases in Markdown."""
    yield f"`python -m tools.kernels.loops`, {_compiler(architecture)}:"
    yield ""
    yield (
        "| server's highest rank | layer | adapter's rank up to | kernel | columns | steps "
        "| instructions | static cycles | tensor core | 16-byte loads | KiB of weights |"
    )
    yield "|---:|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"
    for case in CASES:
        for loop in main_loops(case, architecture):
            counts = loop.counts
            yield (
                f"| {loop.max_rank} | {loop.layer} | {loop.rank} | {loop.kernel} | {loop.columns} "
                f"| {loop.steps} | {counts.instructions} | {counts.cycles} | {counts.tensor_core} "
                f"| {counts.wide_loads} | {loop.weight_bytes / 1024:.0f} |"
            )


def rows_of(text: str) -> Iterator[tuple[str, str, dict[str, int]]]:
    """A table's layers, kernels and numbers, by the heads of the columns."""
    heads, _, *rows = (cells_of(line) for line in text.splitlines() if line.startswith("|"))
    for cells in rows:
        found = dict(zip(heads, cells, strict=True))
        layer, kernel = found.pop("layer"), found.pop("kernel")
        yield layer, kernel, {head: int(text) for head, text in found.items()}


def cells_of(line: str) -> list[str]:
    """The cells of a line of a table in Markdown."""
    return [each.strip() for each in line.strip("|").split("|")]


def _compiler(architecture: str) -> str:
    return f"{table_name(architecture)}, Triton {triton.__version__}"


def in_page(text: str) -> str:
    """The table that a page shows.

    Raises:
        ValueError: It shows none.
    """
    found = _TABLE.search(text)
    if found is None:
        raise ValueError("the page has no table between `<!-- loops -->` and `<!-- end -->`")
    return found[0].strip()


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.loops", description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="90")
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    chosen = parser.parse_args(arguments)
    text = "\n".join(table(chosen.arch))
    if chosen.write:
        page = PAGE.read_text(encoding="utf-8")
        in_page(page)
        PAGE.write_text(_TABLE.sub(lambda _: f"{text}\n", page), encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
