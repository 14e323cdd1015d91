"""Shows the kernels' main loops in decoding, as the compiler scheduled them; needs no GPU.

    python -m tools.kernels.loops [--arch 90] [--write]

For servers of several highest ranks, and for each range of adapters' ranks: what one warp issues
in a step. `--write` puts the table into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

from tools.kernels.measure.launch_cases import LaunchCase, launches, table_name
from tools.kernels.measure.sass import Counts, disassemble
from tools.kernels.report import compile_launch

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
ARCHITECTURES = ("80", "89", "90", "100", "120")
CASES = tuple(
    LaunchCase("gate-up 8B decode", 4096, (14336, 14336), max_rank, tokens=8, by_column=True)
    for max_rank in (16, 64, 256)
)
"""Short batches of a wide layer, with B as it lies in the plugin's slots."""

_TABLE = re.compile(r"(?<=<!-- loops -->\n).*?(?=<!-- end -->)", re.S)
_LOAD_BYTES, _ITEM_BYTES = 16, 2


@dataclass(frozen=True)
class Loop:
    """One main loop.

    Attributes:
        kernel: `shrink` or `expand`.
        max_rank: The server's highest rank.
        rank: The highest rank of the adapters that it is for.
        step: Columns of x (shrink) or of y (expand) that a program takes in a step.
        counts: What one of the program's warps issues in a step.
        weight_bytes: Of A or B, what the programs of a multiprocessor load in a step.
    """

    kernel: str
    max_rank: int
    rank: int
    step: int
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
        if len(found) != len(ranks):
            raise RuntimeError(
                f"{kernel} for {case.title}: {len(ranks)} loops with tensor-core instructions "
                f"were expected in its machine code, {len(found)} are there"
            )
        for rank, counts in zip(ranks, found, strict=True):
            loaded = counts.wide_loads * _LOAD_BYTES * compiled.threads
            # Each column has its own values of A or B, one for each rank, and of x or y.
            step, rest = divmod(loaded, _ITEM_BYTES * (rank + compiled.constants["BLOCK_M"]))
            if rest:
                raise RuntimeError(
                    f"{kernel} for {case.title}: {counts.wide_loads} loads of 16 bytes in the "
                    f"loop for rank {rank} are no whole number of columns"
                )
            weight_bytes = _ITEM_BYTES * rank * step * compiled.per_processor
            yield Loop(kernel, case.max_rank, rank, step, counts, weight_bytes)


def table(architecture: str) -> Iterator[str]:
    """The main loops of all cases in Markdown."""
    yield f"`python -m tools.kernels.loops`, {_compiler(architecture)}:"
    yield ""
    yield (
        "| server's highest rank | adapter's rank up to | kernel | step, columns | instructions "
        "| static cycles | tensor core | 16-byte loads | KiB of weights |"
    )
    yield "|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    for case in CASES:
        for loop in main_loops(case, architecture):
            counts = loop.counts
            yield (
                f"| {loop.max_rank} | {loop.rank} | {loop.kernel} | {loop.step} "
                f"| {counts.instructions} | {counts.cycles} | {counts.tensor_core} "
                f"| {counts.wide_loads} | {loop.weight_bytes / 1024:.0f} |"
            )


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
