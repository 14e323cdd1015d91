"""A base model as planning sees it: what one worker would allocate for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from vllm_multilora.adapters.model.layout import ModelLayout


@dataclass(frozen=True)
class KvCache:
    """What requests take of one worker's KV cache.

    Attributes:
        request_bytes: Of a request of `model_len` tokens, in whole blocks, in all layers.
        model_len: The longest request (`max_model_len`).
    """

    request_bytes: int
    model_len: int

    @property
    def token_bytes(self) -> float:
        """Bytes of a token, over the longest request: layers with sliding windows take less."""
        return self.request_bytes / self.model_len

    def tokens(self, size: int) -> int:
        return size * self.model_len // self.request_bytes

    def requests(self, size: int) -> float:
        return size / self.request_bytes

    def worth(self, size: int) -> str:
        """So many bytes in tokens and requests, for people."""
        return (
            f"{self.tokens(size):,} tokens, or {self.requests(size):.2f} requests of "
            f"{self.model_len:,} tokens"
        )


@dataclass(frozen=True)
class LayerMemory:
    """What one layer, or one of the plugin's tables, allocates for its slots."""

    name: str
    modules: tuple[str, ...]
    slot_bytes: int  # of each slot
    fixed_bytes: int = 0  # whatever the number of slots

    @property
    def suffix(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ in nothing but their numbers."""

    name: str  # with `*` for a number
    layers: int
    slot_bytes: int


@dataclass(frozen=True)
class SlotMemory:
    """All that one worker allocates for slots of one rank."""

    rank: int
    layers: tuple[LayerMemory, ...]
    tables: tuple[LayerMemory, ...]
    largest_adapter: int  # host bytes, of one that has this rank in every module

    @cached_property
    def slot_bytes(self) -> int:
        return sum(part.slot_bytes for part in (*self.layers, *self.tables))

    @cached_property
    def fixed_bytes(self) -> int:
        return sum(part.fixed_bytes for part in (*self.layers, *self.tables))

    def total(self, slots: int) -> int:
        return self.fixed_bytes + slots * self.slot_bytes

    def groups(self) -> Iterator[LayerGroup]:
        """The layers and tables, those of all decoder layers together, in the model's order."""
        grouped: dict[tuple[str, int], list[LayerMemory]] = {}
        for part in (*self.layers, *self.tables):
            name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", part.name)
            grouped.setdefault((name, part.slot_bytes), []).append(part)
        for (name, _), parts in grouped.items():
            yield LayerGroup(name, len(parts), sum(part.slot_bytes for part in parts))


@dataclass(frozen=True)
class BaseModel:
    """A base model on one worker of a server; all bytes are that worker's."""

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
        return tuple(sorted(self.by_rank))

    def rank_for(self, rank: int) -> int:
        """The smallest rank of slots that an adapter of this rank fits in.

        Raises:
            ValueError: There is none.
        """
        return min(allowed for allowed in self.ranks if allowed >= rank)
