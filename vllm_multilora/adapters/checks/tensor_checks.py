"""Whether a checkpoint's tensors fit the base model, judging by the header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_multilora.adapters.checks.placement import Placement
from vllm_multilora.adapters.checks.problem_list import ProblemList
from vllm_multilora.adapters.checks.shape_checks import check_shapes
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.model.found_module import FoundModule
from vllm_multilora.adapters.model.layout import ModelLayout
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
