"""How large an adapter's files may be, known before any of them is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from multilora_kernels.dtypes import FLOAT32
from vllm_multilora.adapters.model.layout import ModelLayout

MIB = 1 << 20
GIB = 1 << 30

_MARGIN = 2  # for copies of embeddings in other dtypes, padding, metadata
_UNKNOWN_PART_BYTES = 64 * GIB
# A tensor takes about 200 bytes of a header, and PEFT may save a base weight beside A and B. What
# is in `__metadata__`, and modules that the base model leaves out, have an allowance.
_HEADER_ALLOWANCE, _HEADER_OF_A_MODULE = MIB, 2048
_TENSORS_ALLOWANCE, _TENSORS_OF_A_MODULE = 2000, 6  # A, B; MonteCLoRA has four more


@dataclass(frozen=True)
class SizeLimits:
    """Bounds of an adapter's files; what is larger is refused unread.

    Attributes:
        config_bytes: Of `adapter_config.json`.
        header_bytes: Of the JSON header of `adapter_model.safetensors`. A mixture of experts
            with 90,000 adapted matrices, two tensors each, needs about 30 MiB; most models need
            far less, see `for_layouts`.
        tensors: How many tensors the header may list, likewise.
    """

    config_bytes: int = 4 * MIB
    header_bytes: int = 48 * MIB
    tensors: int = 400_000

    def for_layouts(self, layouts: Iterable[ModelLayout]) -> SizeLimits:
        """Tighter bounds of the header, in proportion to what the base model has.

        They stay as they are where not all modules are known by name: of a mixture of experts,
        or where other workers have a part of the model.
        """
        modules: set[str] = set()
        for layout in layouts:
            naming = layout.naming
            if layout.special - layout.special_shapes.keys() or naming.others:
                return self
            modules.update(layout.by_name, layout.special, layout.bypassed, naming.unwrapped)
        most = _HEADER_ALLOWANCE + _HEADER_OF_A_MODULE * len(modules)
        tensors = _TENSORS_ALLOWANCE + _TENSORS_OF_A_MODULE * len(modules)
        return replace(
            self,
            header_bytes=min(self.header_bytes, most),
            tensors=min(self.tensors, tensors),
        )

    def most_bytes(self, layout: ModelLayout) -> int:
        """Bytes of tensors that an adapter may have: the largest one in float32, with a margin."""
        unknown = layout.special - layout.special_shapes.keys()
        return self.most_known_bytes(layout) + (_UNKNOWN_PART_BYTES if unknown else 0)

    def most_known_bytes(self, layout: ModelLayout) -> int:
        """Bytes of it for the modules whose shapes are known; what is in holes must keep to it.

        A file of 64 GiB that holds nothing costs nothing to make, and minutes to read.
        """
        modules = {part.name: (part.inputs, part.outputs) for part in layout.slices}
        elements = sum(sum(sizes) for sizes in modules.values()) * layout.max_rank
        elements += sum(outputs for _, outputs in modules.values()) if layout.dora else 0
        for shape in layout.special_shapes.values():
            # PEFT may have saved the base model's own embedding beside its adapter.
            elements += (shape.inputs + shape.outputs) * layout.max_rank
            elements += shape.inputs * shape.outputs
        return _MARGIN * elements * FLOAT32.itemsize + self.header_bytes


DEFAULT_LIMITS = SizeLimits()
