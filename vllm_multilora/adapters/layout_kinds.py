"""Groups of layouts that an adapter has to be checked against only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vllm_multilora.adapters.layout import ModelLayout, SliceLayout


class LayoutKinds:
    """Layouts that differ in what is checked: those of tensor-parallel ranks differ in ranges only.

    Attributes:
        all: Every layout.
        layouts: One of each kind.
        of: The kind of each layout, an index into `layouts`.
    """

    def __init__(self, layouts: Sequence[ModelLayout]) -> None:
        self.all = layouts
        self.layouts: list[ModelLayout] = []
        self.of: list[int] = []
        if len(layouts) == 1:
            self.layouts, self.of = [*layouts], [0]
            return
        kinds: list[ModelLayout] = []
        for layout in layouts:
            kind = _without_ranges(layout)
            if kind not in kinds:
                kinds.append(kind)
                self.layouts.append(layout)
            self.of.append(kinds.index(kind))


def _without_ranges(layout: ModelLayout) -> ModelLayout:
    sizes = sorted({(part.name, part.inputs, part.outputs) for part in layout.slices})
    slices = tuple(SliceLayout(name, 0, k, n, (0, k), (0, n)) for name, k, n in sizes)
    return replace(layout, slices=slices, columns_first=False)
