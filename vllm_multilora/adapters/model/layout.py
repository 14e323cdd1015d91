"""What the running base model accepts of an adapter on this worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from multilora_kernels.dtypes import FLOAT32, DType
from vllm_multilora.adapters.model.naming import ModuleNaming
from vllm_multilora.adapters.model.tensor_names import (
    FUSED_EXPERTS,
    HEADS,
    PARTS,
    WRAPPED,
    WRAPPED_EXPERTS,
    TensorRole,
)

BLOCK_BYTES = 64
"""Blocks of a packed adapter begin at multiples of this: a cache line, a vector register."""


@dataclass(frozen=True)
class SliceLayout:
    """One slice of one layer: what the whole model has, and what this worker keeps of it.

    Attributes:
        name: The module's name in checkpoints, after `ModuleNaming.rename`, such as
            `model.layers.0.self_attn.q_proj`. Slices that share a name are all cut from the
            same two tensors.
        row: This slice's row in the rank tables, counted over all slices of the model.
        inputs: Columns of A in a checkpoint.
        outputs: Rows of B in a checkpoint.
        input_range: First column of A that this worker keeps, and one past the last.
        output_range: First row of B that this worker keeps, and one past the last.
        rank_range: First row of A that this worker keeps, and one past the last, where fully
            sharded LoRA splits the rank between workers. None: all rows.
    """

    name: str
    row: int
    inputs: int
    outputs: int
    input_range: tuple[int, int]
    output_range: tuple[int, int]
    rank_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for what, (first, last), size in (
            ("input_range", self.input_range, self.inputs),
            ("output_range", self.output_range, self.outputs),
        ):
            if not 0 <= first < last <= size:
                raise ValueError(
                    f"{self.name}: {what} ({first}, {last}) is not a part of [0, {size})"
                )

    def rows_of_a(self, rank: int) -> tuple[int, int]:
        """The rows [first, last) of an A of this rank that the worker keeps; may be none."""
        if self.rank_range is None:
            return 0, rank
        first, last = self.rank_range
        return min(first, rank), min(last, rank)


class SpecialKind(StrEnum):
    """What a layer is that vLLM fills in itself, as messages name it."""

    EMBEDDING = "an embedding"
    OUTPUT_HEAD = "an output head"
    EXPERTS = "experts"
    CLASSES = "a head for classes"
    OTHER = "a layer that vLLM fills itself"


@dataclass(frozen=True)
class SpecialShape:
    """Sizes of an embedding or an output head, which vLLM fills in itself.

    Attributes:
        inputs: Columns of A in a checkpoint: an embedding's vocabulary, a head's hidden size.
        outputs: Rows of B in a checkpoint: an embedding's hidden size, a head's vocabulary.
    """

    inputs: int
    outputs: int
    embedding: bool


@dataclass(frozen=True)
class LinearShape:
    """Sizes of another layer that vLLM fills in itself: of experts, or a linear one.

    Attributes:
        inputs: Columns of A in a checkpoint.
        outputs: Rows of B in a checkpoint.
        experts: How many experts a checkpoint's two tensors hold, one rank after the other.
        gated: Of experts, whether gates multiply their inner states: then gates and what they
            multiply are one parameter.
        matrices: How many matrices A and B hold, one after the other; None: each is one.
    """

    inputs: int
    outputs: int
    experts: int = 1
    gated: bool = True
    matrices: tuple[int, int] | None = None


@dataclass(frozen=True)
class ModelLayout:
    """All slices of the base model that packed adapters fill; plain data, which can be sent.

    Attributes:
        max_rank: The largest rank that the slots have room for.
        columns_first: Whether the slots hold B by columns, [r, outputs], as those of linear layers
            do, rather than by rows.
        naming: From modules' names in a checkpoint to their names here.
        special: Modules that vLLM serves from their tensors itself (embeddings, output heads,
            experts): they are no part of a packed adapter.
        special_shapes: Of embeddings and output heads, those included that vLLM does not adapt.
        linear_shapes: Of experts and linear layers among them; of experts that are held as one,
            under the names that PEFT has for both of their parameters.
        tied: Whether the output head has the embedding's weights.
        vocabulary: Token ids that a prompt can have are below it; None: not known.
        dora: Whether slots have room for what DoRA adapters multiply outputs by.
        no_dora: Modules whose outputs cannot be multiplied all the same, and why.
        bypassed: Modules on which adapters would not act, and why; some are among those above.
        merged: Modules that the base model's own code has as one, and slots in parts: the names of
            the parts. The rows of such a module's B are theirs, one part after the other.
    """

    slices: tuple[SliceLayout, ...]
    max_rank: int
    dtype: DType
    columns_first: bool
    naming: ModuleNaming = field(default_factory=ModuleNaming)
    special: frozenset[str] = frozenset()
    special_shapes: Mapping[str, SpecialShape] = field(default_factory=dict)
    linear_shapes: Mapping[str, LinearShape] = field(default_factory=dict)
    tied: bool = False
    vocabulary: int | None = None
    dora: bool = False
    no_dora: Mapping[str, str] = field(default_factory=dict)
    bypassed: Mapping[str, str] = field(default_factory=dict)
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, tuple[SliceLayout, ...]]:
        """The slices that each module's tensors are cut into."""
        found: dict[str, tuple[SliceLayout, ...]] = {}
        for part in self.slices:
            found[part.name] = (*found.get(part.name, ()), part)
        return found

    @cached_property
    def by_tensor(self) -> Mapping[str, tuple[TensorRole, str]]:
        """What PEFT calls A and B of plain modules: their roles, and the modules' names here.

        Most tensors of most adapters are among them. Only modules that a checkpoint calls as the
        running model does, and that slots have whole: other names have to be read part by part.
        """
        names = [
            name
            for name in self.by_name
            if not self.is_special(name)
            and name not in self.bypassed
            and self.parts(name) == (name,)
            and self.naming.rename(name) == name
        ]
        roles = [TensorRole(name, part) for name in names for part in PARTS]
        return {role.of(role.module): (role, role.module) for role in roles}

    def parts(self, module: str) -> tuple[str, ...]:
        """The modules that slots have for one (its name here): itself, or those merged in it."""
        return self.merged.get(module, (module,))

    def outer_parameter(self, experts: str) -> str:
        """PEFT's name for the parameter beside `down_proj` of experts that are stored together."""
        shape = self.linear_shapes.get(f"{experts}{WRAPPED}")
        return "gate_up_proj" if shape is None or shape.gated else "up_proj"

    def is_special(self, module: str) -> bool:
        """Whether a module (its name here) is served by vLLM itself."""
        if module.endswith(WRAPPED_EXPERTS):
            module = module.removesuffix(WRAPPED)
        return module in self.special

    def kind_of_special(self, module: str) -> SpecialKind | None:
        """What a module (its name here) is that packed adapters do not fill; None for others."""
        if (shape := self.special_shapes.get(module)) is not None:
            return SpecialKind.EMBEDDING if shape.embedding else SpecialKind.OUTPUT_HEAD
        if not self.is_special(module):
            return None
        if f"{FUSED_EXPERTS}." in f"{module}.":
            return SpecialKind.EXPERTS
        if set(HEADS) & set(module.split(".")):
            return SpecialKind.CLASSES
        return SpecialKind.OTHER

    def largest_bytes(self) -> int:
        """Bytes of a packed adapter that has the largest rank on every slice."""
        magnitudes = sum(map(self.magnitude_bytes, self.slices)) if self.dora else 0
        return magnitudes + sum(
            block_bytes(rows * columns, self.dtype)
            for part in self.slices
            for rows, columns in self.block_shapes(part, self.max_rank)
        )

    def magnitude_bytes(self, part: SliceLayout) -> int:
        """Bytes of a slice's magnitudes in a packed DoRA adapter; they are float32."""
        return block_bytes(part.output_range[1] - part.output_range[0], FLOAT32)

    def block_shapes(self, part: SliceLayout, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of a slice's A and B in a packed adapter, [rows, columns] as they are stored."""
        first, last = part.rows_of_a(rank)
        outputs = part.output_range[1] - part.output_range[0]
        inputs = part.input_range[1] - part.input_range[0]
        return (last - first, inputs), (rank, outputs) if self.columns_first else (outputs, rank)


def block_bytes(elements: int, dtype: DType) -> int:
    """Bytes that a block takes in a packed adapter, up to where the next one begins."""
    return -(-elements * dtype.itemsize // BLOCK_BYTES) * BLOCK_BYTES
