"""Which of a checkpoint's tensors fill which slices of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vllm_multilora.adapters.checks.tensor_checks import TensorReport
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout


class MatchedModule(NamedTuple):
    """A module's tensors, found to fit.

    Attributes:
        name: The module's name in the layout.
        a_name: The name of A in the file.
        b_name: The name of B in the file.
        rank: The true rank.
        scaling: The factor of B @ A.
        magnitude: The name of DoRA's magnitudes in the file; None: it has none.
        first_row: The row of B, and the magnitude, that its first output has: not 0 in parts of a
            module that is merged in the file.
    """

    name: str
    a_name: str
    b_name: str
    rank: int
    scaling: float
    magnitude: str | None = None
    first_row: int = 0

    def rows_of(self, part: SliceLayout) -> tuple[int, int]:
        """The rows [first, last) of B that a worker keeps for a slice."""
        first, last = part.output_range
        return self.first_row + first, self.first_row + last


def matched_modules(
    report: TensorReport,
    tensors: Mapping[str, TensorInfo],
    config: AdapterConfig,
    layout: ModelLayout,
) -> list[MatchedModule]:
    """The modules of an adapter without problems that packed adapters fill.

    Raises:
        AdapterFormatError: The configuration's patterns take too long to match.
    """
    matched = []
    for module in report.modules:
        if layout.is_special(module.name):
            continue
        a_name, b_name = module.tensors["A"], module.tensors["B"]
        rank, scaling = tensors[a_name].shape[0], config.scaling(module.target)
        magnitude = module.tensors.get("magnitude")
        row = 0
        for part in layout.parts(module.name):
            matched.append(MatchedModule(part, a_name, b_name, rank, scaling, magnitude, row))
            row += layout.by_name[part][0].outputs
    return matched
