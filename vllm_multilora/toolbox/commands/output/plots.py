"""What all plots have in common; they need matplotlib, which is an optional extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_multilora.errors import MultiLoRAError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


@contextmanager
def over_slots(counts: Sequence[int], path: Path) -> Iterator[Axes]:
    """Within it, lines over these numbers of slots are drawn; then the picture is written.

    The same picture is the same bytes.

    Args:
        counts: The numbers of slots, ascending.
        path: The file; its ending is the format.

    Raises:
        PlotError: matplotlib is missing or cannot write the file.
    """
    require(path)
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
