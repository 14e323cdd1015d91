"""Plots over the number of slots; they need matplotlib, which is an optional extra."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.slots.budget import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan

FORMATS = (".png", ".svg")
"""What the names of pictures may end in, which decides what they are."""


class PlotError(MultiLoRAError):
    """The picture cannot be made."""


def require(path: Path) -> None:
    """Says what is missing for a plot, before anything is computed for it.

    Raises:
        PlotError: There is no matplotlib, no such folder, or no such format.
    """
    if find_spec("matplotlib") is None:
        raise PlotError("--plot needs matplotlib: pip install 'vllm-multilora[plot]'")
    if not path.parent.is_dir():
        raise PlotError(f"{path}: the plot cannot be written: there is no folder {path.parent}")
    if path.suffix.lower() not in FORMATS:
        found = f"ends in {path.suffix!r}" if path.suffix else "has no ending"
        raise PlotError(
            f"{path}: the plot cannot be written: its name {found}, expected one of "
            f"{', '.join(FORMATS)}"
        )


def draw_hit_rates(
    slots: Sequence[int], rates: Mapping[str, Sequence[float]], title: str, path: Path
) -> None:
    """Draws hit rates, 0 to 1, over numbers of slots, ascending; that called `optimum` is dashed.

    Raises:
        PlotError: The file cannot be written.
    """
    with _over_slots(slots, path) as axes:
        for label, line in rates.items():
            # Curves often coincide: the later ones are narrower, so that each remains to be seen.
            look = "k--" if label == "optimum" else "o-"
            width = 1 + 3 * (len(rates) - len(axes.lines) - 1) / len(rates)
            axes.plot(slots, [100 * rate for rate in line], look, label=label, linewidth=width)
        axes.set(ylabel="GPU hit rate, %", title=title, ylim=(0, 100))


def draw_memory(plan: MemoryPlan, path: Path) -> None:
    """Draws a worker's memory for slots over their number, a line for each rank.

    The plan's own settings are marked. Where the GPU is known, a dashed line says what vLLM may
    take of it beside the weights: a setting above it does not fit, one below leaves the rest for
    the KV cache.

    Raises:
        PlotError: The file cannot be written.
    """
    counts = plan.slot_counts
    with _over_slots(counts, path) as axes:
        for rank in plan.compared_ranks:
            totals = [plan.model.by_rank[rank].total(count) / GIB for count in counts]
            axes.plot(counts, totals, "o-", markersize=4, label=f"rank {rank}")
        gib = plan.total / GIB
        label = f"{plan.max_loras} of rank {plan.max_lora_rank}: {gib:.2f} GiB"
        axes.plot([plan.max_loras], [gib], "k*", markersize=13, label=label)
        if plan.budget is not None and plan.budget > 0:
            budget = plan.budget / GIB
            axes.axhline(budget, color="k", linestyle="--", linewidth=1)
            text = f" {budget:.1f} GiB for slots and KV cache"
            axes.annotate(text, (counts[0], budget), verticalalignment="bottom")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        title = f"{plan.model.architecture}, slots in {plan.model.lora_dtype}"
        axes.set(ylabel="GiB of each worker", title=title)


@contextmanager
def _over_slots(counts: Sequence[int], path: Path) -> Iterator[Axes]:
    """Within it, lines over these numbers of slots are drawn; then the picture is written.

    The same picture is the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    yield axes
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.set(xlabel="slots (--max-loras)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with mpl.rc_context({"svg.hashsalt": path.stem}):
            is_svg = path.suffix.lower() == ".svg"
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path}: the plot cannot be written: {error}") from error
    print(f"wrote {path}", file=sys.stderr)
