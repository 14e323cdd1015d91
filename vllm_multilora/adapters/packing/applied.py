"""What of an adapter is applied: modules, tensors, and their scaling factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from multilora_kernels.dtypes import FLOAT32, KERNEL_DTYPES
from vllm_multilora.adapters.checks.shape_checks import TensorReport
from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.files.one_pass import TensorPart
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout


class MatchedModule(NamedTuple):
    """The names of a module's tensors that packed slots are filled from, found to fit.

    Attributes:
        rank: The true rank.
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


@dataclass(frozen=True)
class RawPart:
    """A tensor that vLLM is given as it is; see `RawTensor`."""

    tensor: str
    rank: int = 0
    scaling: float = 1.0


@dataclass(frozen=True)
class Applied:
    """What of an adapter one layout's workers apply.

    Attributes:
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
    modules: list[MatchedModule] = []
    raw: list[RawPart] = []
    factors: list[tuple[str, float]] = []
    magnitudes: list[str] = []
    for found in report.modules:
        rank, scaling = 0, 1.0
        if config is not None:
            rank, scaling = config.rank_of(found.target), config.scaling(found.target)
        for part, tensor in found.tensors.items():
            if part == "magnitude":
                magnitudes.append(tensor)
            else:
                factors.append((tensor, scaling if part == "B" else 1.0))
        if layout is None:
            continue
        if layout.is_special(found.name):
            raw += [RawPart(tensor, rank, scaling) for tensor in found.tensors.values()]
            continue
        a, b, magnitude = found.tensors["A"], found.tensors["B"], found.tensors.get("magnitude")
        true_rank, row = file.tensors[a].shape[0], 0
        for name in layout.parts(found.name):
            modules.append(MatchedModule(name, a, b, true_rank, scaling, magnitude, row))
            row += layout.by_name[name][0].outputs
    factors += [(head, 1.0) for head in report.heads]
    return Applied(
        tuple(modules),
        (*raw, *map(RawPart, report.heads)),
        tuple(
            (name, factor) for name, factor in factors if file.tensors[name].dtype in KERNEL_DTYPES
        ),
        tuple(name for name in magnitudes if file.tensors[name].dtype in KERNEL_DTYPES),
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
