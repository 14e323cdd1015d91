"""Plots hit rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vllm_multilora.toolbox.commands.output import plots


def draw(
    slots: Sequence[int], rates: Mapping[str, Sequence[float]], title: str, path: Path
) -> None:
    """Draws the GPU hit rate over the number of slots.

    Args:
        slots: The numbers of slots, ascending.
        rates: For each label the hit rate, 0 to 1, at each of `slots`; a label `optimum` is
            drawn dashed.
        title: Above the picture.
        path: The file; its ending is the format.

    Raises:
        PlotError: matplotlib is missing or cannot write the file.
    """
    with plots.over_slots(slots, path) as axes:
        for label, line in rates.items():
            # Curves often coincide: the later ones are narrower, so that each remains to be seen.
            look = "k--" if label == "optimum" else "o-"
            width = 1 + 3 * (len(rates) - len(axes.lines) - 1) / len(rates)
            axes.plot(slots, [100 * rate for rate in line], look, label=label, linewidth=width)
        axes.set(ylabel="GPU hit rate, %", title=title, ylim=(0, 100))
