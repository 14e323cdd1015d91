"""A base model as planning sees it: what one worker would allocate for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from vllm_multilora.adapters.model.layout import ModelLayout


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
class SlotMemory:
    """All that one worker allocates for slots of one rank.

    Attributes:
        largest_adapter: Host bytes of an adapter that has this rank in every module.
    """

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

    def groups(self) -> Iterator[tuple[str, int, int]]:
        """The layers and tables in the model's order, those of all decoder layers together.

        Each comes with its name, how many there are, and what a slot takes in all of them.
        """
        grouped: dict[tuple[str, int], list[LayerMemory]] = {}
        for part in (*self.layers, *self.tables):
            name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", part.name)
            grouped.setdefault((name, part.slot_bytes), []).append(part)
        for (name, _), parts in grouped.items():
            yield name, len(parts), sum(part.slot_bytes for part in parts)


@dataclass(frozen=True)
class KvCache:
    """What requests take of one worker's KV cache.

    Attributes:
        request_bytes: Of a request of `model_len` tokens, in whole blocks, in all layers.
    """

    request_bytes: int
    model_len: int

    @property
    def token_bytes(self) -> float:
        """Bytes of a token, over the longest request: layers with sliding windows take less."""
        return self.request_bytes / self.model_len

    def tokens(self, size: int) -> int:
        """Whole tokens that fit into so many bytes, as vLLM counts them when it starts."""
        return size * self.model_len // self.request_bytes

    def requests(self, size: int) -> float:
        """Requests of `model_len` tokens that fit into so many bytes."""
        return size / self.request_bytes

    def worth(self, size: int) -> str:
        """So many bytes in tokens and requests, for people."""
        return (
            f"{self.tokens(size):,} tokens, or {self.requests(size):.2f} requests of "
            f"{self.model_len:,} tokens"
        )


@dataclass(frozen=True)
class BaseModel:
    """A base model on one worker of a server; all bytes are that worker's.

    Attributes:
        dtype: Of its weights' computation.
        lora_dtype: Of the slots.
        fully_sharded: Whether LoRA is sharded as far as it goes (`fully_sharded_loras`).
        weight_bytes: Of its parameters and buffers, as they are loaded.
        utilization: Share of a GPU's memory that vLLM would take (`gpu_memory_utilization`).
        kv_cache: None where the model has no KV cache.
        by_rank: Its slots' memory by rank: all ranks that this server could have.
        layouts: What it accepts of adapters, by the same ranks.
        staging_bytes: What copies into slots go through on a GPU, whatever the slots.
    """

    name: str
    architecture: str
    dtype: str
    lora_dtype: str
    tensor_parallel_size: int
    fully_sharded: bool
    weight_bytes: int
    utilization: float
    kv_cache: KvCache | None
    by_rank: Mapping[int, SlotMemory]
    layouts: Mapping[int, ModelLayout]
    staging_bytes: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that slots can have, ascending."""
        return tuple(sorted(self.by_rank))

    def rank_for(self, rank: int) -> int:
        """The smallest rank of slots that an adapter of this rank, no larger than all, fits in."""
        return min(allowed for allowed in self.ranks if allowed >= rank)
