"""The memory of adapter slots, as one worker allocates it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LayerMemory:
    """What one layer, or one of the plugin's tables, allocates for its slots.

    Attributes:
        name: The layer's name in the running model.
        modules: What adapters call the modules that the layer serves: one, or those that the
            model fuses.
        slot_bytes: What every further slot adds.
        fixed_bytes: What does not depend on the number of slots.
    """

    name: str
    modules: tuple[str, ...]
    slot_bytes: int
    fixed_bytes: int = 0

    @property
    def suffix(self) -> str:
        """The last part of its name, by which `--lora-target-modules` picks layers."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ in nothing but their numbers.

    Attributes:
        name: Their name, with `*` for a number.
        layers: How many there are.
        slot_bytes: What a slot takes in all of them.
    """

    name: str
    layers: int
    slot_bytes: int


@dataclass(frozen=True)
class SlotMemory:
    """All that one worker allocates for slots of one rank.

    Attributes:
        rank: The slots' rank (`max_lora_rank`).
        layers: vLLM's layers with LoRA.
        tables: The plugin's own device buffers.
        largest_adapter: Host bytes of an adapter that has this rank in every module.
    """

    rank: int
    layers: tuple[LayerMemory, ...]
    tables: tuple[LayerMemory, ...]
    largest_adapter: int

    @cached_property
    def slot_bytes(self) -> int:
        """What every slot takes."""
        return sum(part.slot_bytes for part in (*self.layers, *self.tables))

    @cached_property
    def fixed_bytes(self) -> int:
        """What is taken whatever the number of slots."""
        return sum(part.fixed_bytes for part in (*self.layers, *self.tables))

    def total(self, slots: int) -> int:
        """Bytes of that many slots."""
        return self.fixed_bytes + slots * self.slot_bytes

    def groups(self) -> Iterator[LayerGroup]:
        """The layers and tables, those of all decoder layers together, in the model's order."""
        grouped: dict[tuple[str, int], list[LayerMemory]] = {}
        for part in (*self.layers, *self.tables):
            name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", part.name)
            grouped.setdefault((name, part.slot_bytes), []).append(part)
        for (name, _), parts in grouped.items():
            yield LayerGroup(name, len(parts), sum(part.slot_bytes for part in parts))
