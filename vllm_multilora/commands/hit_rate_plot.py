"""A picture of hit rates; needs matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from vllm_multilora.errors import MultiLoRAError


class PlotError(MultiLoRAError):
    """The picture cannot be made."""


def require(path: Path) -> None:
    """Says what is missing for a plot, before anything is computed for it.

    Raises:
        PlotError: There is no matplotlib, no such folder, or no such format.
    """
    if find_spec("matplotlib") is None:
        raise PlotError("--plot needs matplotlib: pip install 'vllm-multilora[plot]'")
    from matplotlib.backend_bases import FigureCanvasBase

    if not path.parent.is_dir():
        raise PlotError(f"{path}: the plot cannot be written: there is no folder {path.parent}")
    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise PlotError(
            f"{path}: the plot cannot be written: its name must end in one of "
            f"{', '.join(f'.{name}' for name in sorted(formats))}"
        )


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
    require(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for label, line in rates.items():
        # Curves often coincide: the later ones are narrower, so that each remains to be seen.
        look = "k--" if label == "optimum" else "o-"
        width = 1 + 3 * (len(rates) - len(axes.lines) - 1) / len(rates)
        axes.plot(slots, [100 * rate for rate in line], look, label=label, linewidth=width)
    axes.set_xscale("log", base=2)
    axes.set_xticks(slots, labels=[str(count) for count in slots])
    axes.set(xlabel="slots (--max-loras)", ylabel="GPU hit rate, %", title=title, ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path}: the plot cannot be written: {error}") from error
