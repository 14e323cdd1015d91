"""A server's settings, what follows from them, and what the adapters in a directory need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from vllm_multilora.integration.offline.base_model import BaseModel, SlotMemory
from vllm_multilora.toolbox.planning.adapter_survey import Survey, SurveyedAdapter

COMMON_SLOTS = (1, 4, 16, 64)
COMMON_RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class RankNeed:
    """What all slots would cost with one rank, and which adapters they would leave out."""

    rank: int
    fits: int
    left_out: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class UnusedLayers:
    """Layers that no adapter touches, by the last parts of their names, and what slots take there.

    Attributes:
        targets: The other layers: what `--lora-target-modules` would be.
    """

    suffixes: tuple[str, ...]
    targets: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Advice:
    """What a directory's adapters say about a server's settings.

    Attributes:
        needs: What each setting smaller than the one that serves all would save, and that one
            itself, ascending.
        unused: Layers that slots are allocated for and no adapter needs; None if there are none.
    """

    needs: tuple[RankNeed, ...]
    unused: UnusedLayers | None

    @property
    def max_lora_rank(self) -> int:
        """The smallest setting that serves all of them."""
        return self.needs[-1].rank


@dataclass(frozen=True)
class MemoryPlan:
    """What a server would cost; all bytes are one worker's unless said otherwise.

    Attributes:
        max_lora_rank: The slots' rank; one of the model's.
        gpu_bytes: Memory of a GPU; None: not said.
        utilization: Share of it that vLLM takes.
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


def advise(model: BaseModel, survey: Survey, slots: int) -> Advice | None:
    """What adapters need, surveyed with the largest of the model's ranks; None without adapters."""
    adapters = survey.adapters
    if not adapters:
        return None
    # An adapter in the survey fits the model's largest rank, or it would have been refused.
    needed = sorted({model.rank_for(adapter.rank) for adapter in adapters})
    needs = []
    for rank in needed:
        left_out = tuple(adapter.name for adapter in adapters if adapter.rank > rank)
        size = model.by_rank[rank].total(slots)
        needs.append(RankNeed(rank, len(adapters) - len(left_out), left_out, size))
    return Advice(tuple(needs), _unused(model.by_rank[needed[-1]], adapters, slots))


def _unused(
    memory: SlotMemory, adapters: Iterable[SurveyedAdapter], slots: int
) -> UnusedLayers | None:
    adapted = frozenset[str]().union(*(adapter.modules for adapter in adapters))
    used = {
        layer.suffix
        for layer in memory.layers
        if not adapted.isdisjoint((layer.name, *layer.modules))
        or any(module.startswith(layer.name + ".") for module in adapted)
    }
    unused = [layer for layer in memory.layers if layer.suffix not in used]
    if not unused or not used:
        return None
    return UnusedLayers(
        tuple(dict.fromkeys(layer.suffix for layer in unused)),
        tuple(dict.fromkeys(layer.suffix for layer in memory.layers if layer.suffix in used)),
        sum(slots * layer.slot_bytes + layer.fixed_bytes for layer in unused),
    )
