"""What of an adapter is applied: modules, tensors, and their scaling factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multilora_kernels.dtypes import FLOAT32
from vllm_multilora.adapters.checks.matching import MatchedModule, TensorReport, matched_modules
from vllm_multilora.adapters.checks.shape_checks import WEIGHT_DTYPES
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.one_pass import TensorPart
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.model.layout import ModelLayout


@dataclass(frozen=True)
class RawPart:
    """A tensor that vLLM is given as it is.

    Attributes:
        tensor: Its name in the file.
        rank: Of the module whose A or B it is; 0 if it is a head saved whole.
        scaling: The factor of that module's B @ A.
    """

    tensor: str
    rank: int = 0
    scaling: float = 1.0


@dataclass(frozen=True)
class Applied:
    """What of an adapter one layout's workers apply.

    Attributes:
        modules: Those that packed slots are filled from.
        raw: The tensors that vLLM is given as they are.
        factors: Every other tensor that is applied, and the factor of its values.
        magnitudes: Names of DoRA's magnitudes, which are float32 whatever slots are.
    """

    modules: tuple[MatchedModule, ...]
    raw: tuple[RawPart, ...]
    factors: tuple[tuple[str, float], ...]
    magnitudes: tuple[str, ...] = ()


def applied_of(
    file: TensorFile,
    config: AdapterConfig | None,
    report: TensorReport,
    layout: ModelLayout | None = None,
) -> Applied:
    """What is applied of an adapter; modules only of one without problems, for its `layout`."""
    factors: list[tuple[str, float]] = []
    raw: list[RawPart] = []
    magnitudes: list[str] = []
    for module in report.modules:
        rank, scaling = 0, 1.0
        if config is not None:
            rank, scaling = config.rank_of(module.target), config.scaling(module.target)
        for part, tensor in module.tensors.items():
            if part == "magnitude":
                magnitudes.append(tensor)
            else:
                factors.append((tensor, scaling if part == "B" else 1.0))
        if layout is not None and layout.is_special(module.name):
            raw += [RawPart(tensor, rank, scaling) for tensor in module.tensors.values()]
    factors += [(head, 1.0) for head in report.heads]
    modules = (
        matched_modules(report, file.tensors, config, layout)
        if layout is not None and config is not None
        else ()
    )
    return Applied(
        tuple(modules),
        (*raw, *map(RawPart, report.heads)),
        tuple(
            (name, factor) for name, factor in factors if file.tensors[name].dtype in WEIGHT_DTYPES
        ),
        tuple(name for name in magnitudes if file.tensors[name].dtype in WEIGHT_DTYPES),
    )


def judged(applied: Sequence[Applied], layouts: Sequence[ModelLayout]) -> list[TensorPart]:
    """Every tensor that is applied, to be judged as a whole."""
    parts = [
        TensorPart(name, layout.dtype, factor)
        for layout, of in zip(layouts, applied, strict=True)
        for name, factor in of.factors
    ]
    parts += [TensorPart(name, FLOAT32) for of in applied for name in of.magnitudes]
    return list(dict.fromkeys(parts))
