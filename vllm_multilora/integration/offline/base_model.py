"""A base model as planning sees it: what one worker would allocate for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.integration.offline.kv_cache import KvCache
from vllm_multilora.integration.offline.slot_memory import SlotMemory


@dataclass(frozen=True)
class BaseModel:
    """A base model on one worker of a server; all bytes are that worker's.

    Attributes:
        name: As it was given.
        architecture: vLLM's class.
        dtype: Of its weights' computation.
        lora_dtype: Of the slots.
        tensor_parallel_size: How many workers share it.
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
        """The smallest rank of slots that an adapter of this rank fits in.

        Raises:
            ValueError: There is none.
        """
        return min(allowed for allowed in self.ranks if allowed >= rank)
