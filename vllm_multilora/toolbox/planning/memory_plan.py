"""A server's settings, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from vllm_multilora.integration.offline.base_model import BaseModel, SlotMemory
from vllm_multilora.toolbox.planning.adapter_survey import Survey
from vllm_multilora.toolbox.planning.plan_hints import Advice, advise

COMMON_SLOTS = (1, 4, 16, 64)
COMMON_RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class MemoryPlan:
    """What a server would cost; all bytes are one worker's unless said otherwise.

    Attributes:
        model: The base model.
        max_loras: Slots.
        max_lora_rank: Their rank; one of the model's.
        gpu_bytes: Memory of a GPU; None: not said.
        utilization: Share of it that vLLM takes.
        survey: The adapters to serve; None: not said.
    """

    model: BaseModel
    max_loras: int
    max_lora_rank: int
    gpu_bytes: int | None = None
    utilization: float = 1.0
    survey: Survey | None = None

    @property
    def memory(self) -> SlotMemory:
        """The slots' memory."""
        return self.model.by_rank[self.max_lora_rank]

    @property
    def total(self) -> int:
        """Bytes of all slots."""
        return self.memory.total(self.max_loras)

    @property
    def slot_counts(self) -> tuple[int, ...]:
        """The settings of `max_loras` to compare."""
        return tuple(sorted({*COMMON_SLOTS, self.max_loras}))

    @property
    def compared_ranks(self) -> tuple[int, ...]:
        """The settings of `max_lora_rank` to compare."""
        requested = {*COMMON_RANKS, self.max_lora_rank}
        if self.advice:
            requested.add(self.advice.max_lora_rank)
        return tuple(rank for rank in self.model.ranks if rank in requested)

    @property
    def budget(self) -> int | None:
        """What vLLM takes of the GPU without the weights; None where the GPU is not known."""
        if self.gpu_bytes is None:
            return None
        return int(self.gpu_bytes * self.utilization) - self.model.weight_bytes

    @property
    def left(self) -> int | None:
        """What the slots, and the copies into them, leave of that; negative: they do not fit."""
        if self.budget is None:
            return None
        return self.budget - self.total - self.model.staging_bytes

    @property
    def host_least(self) -> int:
        """Host bytes that all workers need for a batch's adapters, if all have the full rank."""
        return self.max_loras * self.memory.largest_adapter * self.model.tensor_parallel_size

    @cached_property
    def advice(self) -> Advice | None:
        """What the adapters need; None without adapters."""
        return advise(self.model, self.survey, self.max_loras) if self.survey else None

    @cached_property
    def host_bytes(self) -> dict[str, int]:
        """Host bytes of every adapter in all workers, by name."""
        if self.survey is None or self.advice is None:
            return {}
        layout = self.model.layouts[max(self.max_lora_rank, self.advice.max_lora_rank)]
        return {
            adapter.name: adapter.host_bytes(layout) * self.model.tensor_parallel_size
            for adapter in self.survey.adapters
        }
