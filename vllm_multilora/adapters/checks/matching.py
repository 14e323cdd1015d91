"""Which of a checkpoint's tensors fill which slices of the base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from vllm_multilora.adapters.checks.placement import Placement
from vllm_multilora.adapters.checks.problem_list import ProblemList
from vllm_multilora.adapters.checks.shape_checks import check_shapes
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.model.tensor_names import FoundModule
from vllm_multilora.adapters.problems import Problem


@dataclass(frozen=True)
class TensorReport:
    """What is to be made of a checkpoint's tensors.

    Attributes:
        modules: The modules that the base model serves.
        heads: Tensors of classification heads saved whole.
        problems: All that is wrong with names, types and shapes.
    """

    modules: tuple[FoundModule, ...]
    heads: tuple[str, ...]
    problems: tuple[Problem, ...]


def check_tensors(
    tensors: Mapping[str, TensorInfo],
    config: AdapterConfig | None,
    layout: ModelLayout,
    file: str,
) -> TensorReport:
    """Finds the module of each tensor, and all tensors that have none or do not fit.

    Args:
        tensors: What the header says, by name.
        config: The configuration; None, if it is broken, leaves out what depends on it.
        layout: What the base model accepts.
        file: What problems call the file.

    Raises:
        AdapterFormatError: The configuration's patterns take too long to match.
    """
    problems = ProblemList(file)
    placement = Placement(tensors, config, layout, problems)
    check_shapes(placement, tensors, config, layout, problems)
    return TensorReport(
        tuple(placement.modules.values()), tuple(placement.heads), tuple(problems.grouped())
    )


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
