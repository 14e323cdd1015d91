"""How large an adapter's files may be, known before anything of them is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_multilora.adapters.layout import ModelLayout

MIB = 1 << 20
GIB = 1 << 30

_MARGIN = 2  # for copies of embeddings in other dtypes, padding, metadata
_UNKNOWN_PART_BYTES = 64 * GIB


@dataclass(frozen=True)
class Limits:
    """Bounds of an adapter's files; what is larger is refused unread.

    Attributes:
        config_bytes: Of `adapter_config.json`.
        header_bytes: Of the JSON header of `adapter_model.safetensors`. A mixture of experts
            with 90,000 adapted matrices, two tensors each, needs about 30 MiB.
        tensors: How many tensors the header may list.
        total_bytes: Of `adapter_model.safetensors`; None: what the base model's largest adapter
            takes in float32, with a margin (see `most_bytes`).
    """

    config_bytes: int = 4 * MIB
    header_bytes: int = 48 * MIB
    tensors: int = 400_000
    total_bytes: int | None = None

    def most_bytes(self, layout: ModelLayout) -> int:
        """Bytes that the tensor file of an adapter for this base model may have."""
        if self.total_bytes is not None:
            return self.total_bytes
        modules = {part.name: (part.inputs, part.outputs) for part in layout.slices}
        elements = sum(sum(sizes) for sizes in modules.values()) * layout.max_rank
        for shape in layout.special_shapes.values():
            # PEFT may have saved the base model's own embedding beside its adapter.
            elements += (shape.inputs + shape.outputs) * layout.max_rank
            elements += shape.inputs * shape.outputs
        unknown = layout.special - layout.special_shapes.keys()
        return (
            _MARGIN * elements * torch.float32.itemsize
            + self.header_bytes
            + (_UNKNOWN_PART_BYTES if unknown else 0)
        )


DEFAULT_LIMITS = Limits()
