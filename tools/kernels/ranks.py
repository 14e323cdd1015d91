"""Shows registers of the expand kernel for servers of every highest rank; needs no GPU.

    python -m tools.kernels.ranks [--arch 90] [--write]

A row is one card under the Triton that is installed. `--write` puts rows into
kernels/triton/README.md, in place of those of the same card and Triton. The command fails where a
launch spills, or is given more programs than a multiprocessor holds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import triton

from tools.kernels.loops import cells_of
from tools.kernels.measure.batches import LAYERS
from tools.kernels.measure.tuned.launch_cases import LaunchCase, launches, table_name
from tools.kernels.report import compile_launch

PAGE = Path(__file__).parents[2] / "kernels" / "triton" / "README.md"
ARCHITECTURES = ("80", "90", "100", "120", "gfx942")
MAX_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""Highest ranks that vLLM offers, from the narrowest block on."""
TOKENS = (8, 64)
"""Batches of decoding: the one with most planes of h, and the one with most programs."""

_TABLE = re.compile(r"(?<=<!-- ranks -->\n).*?(?=\n<!-- end -->)", re.S)
_FIRST_CELLS = 2  # Triton's version and the card


def cell(architecture: str, max_rank: int) -> tuple[str, list[str]]:
    """A thread's registers for each of `TOKENS`, and what is wrong.

    Args:
        architecture: One of `CARDS`.
        max_rank: The server's highest rank.
    """
    found, problems = [], []
    layer = LAYERS["8b.gate_up"]
    for tokens in TOKENS:
        case = LaunchCase(layer.name, layer.inputs, layer.outputs, max_rank, tokens, by_column=True)
        *_, launch = launches(case, architecture)
        compiled = compile_launch(case.title, launch, architecture)
        spilled = f" ({compiled.spilled_bytes} spilled)" if compiled.spilled_bytes else ""
        found.append(f"{compiled.registers}{spilled}")
        if compiled.problem is not None:
            problems.append(f"{case.title} on {table_name(architecture)}: {compiled.problem}")
    return ", ".join(found), problems


def row(architecture: str, cells: Iterable[str]) -> str:
    """A card's row in Markdown."""
    return f"| {triton.__version__} | {table_name(architecture)} | {' | '.join(cells)} |"


def table(rows: Iterable[str]) -> str:
    """Rows below their heads, by Triton and card."""
    heads = " | ".join(map(str, MAX_RANKS))
    lines = [f"| Triton | card | {heads} |", "|---|---|" + "---:|" * len(MAX_RANKS)]
    return "\n".join([*lines, *sorted(rows, key=_key)])


def rows_in_page() -> dict[tuple[str, str], list[str]]:
    """Cells of the page's rows, by Triton and card.

    Raises:
        ValueError: The page shows no such table.
    """
    found = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError("the page has no table between `<!-- ranks -->` and `<!-- end -->`")
    cells = [cells_of(line) for line in found[0].strip().splitlines()[2:]]
    return {(each[0], each[1]): each[_FIRST_CELLS:] for each in cells}


def _key(line: str) -> tuple[str, int]:
    version, card, *_ = cells_of(line)
    return version, list(map(table_name, ARCHITECTURES)).index(card)


def _write(rows: Iterable[str]) -> None:
    kept = {
        (version, card): f"| {version} | {card} | {' | '.join(cells)} |"
        for (version, card), cells in rows_in_page().items()
    }
    for line in rows:
        version, card, *_ = cells_of(line)
        kept[version, card] = line
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(lambda _: table(kept.values()), text), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Prints or writes rows; returns 1 where something spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.ranks", description=__doc__)
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append")
    parser.add_argument("--write", action="store_true", help="into kernels/triton/README.md")
    chosen = parser.parse_args(arguments)
    rows, problems = [], []
    for architecture in chosen.arch or ARCHITECTURES:
        found = [cell(architecture, max_rank) for max_rank in MAX_RANKS]
        rows.append(row(architecture, (text for text, _ in found)))
        problems += [problem for _, each in found for problem in each]
        if chosen.write:
            _write(rows[-1:])
    if not chosen.write:
        print(table(rows))
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
