"""What all plots have in common; they need matplotlib, which is an optional extra."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_multilora.errors import MultiLoRAError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def save(figure: Figure, path: Path) -> None:
    """Writes a picture; the same one is the same bytes.

    Raises:
        PlotError: The file cannot be written.
    """
    import matplotlib as mpl

    try:
        with mpl.rc_context({"svg.hashsalt": path.stem}):
            is_svg = path.suffix.lower() == ".svg"
            figure.savefig(path, dpi=150, metadata={"Date": None} if is_svg else None)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path}: the plot cannot be written: {error}") from error
