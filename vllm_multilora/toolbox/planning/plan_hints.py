"""Conclusions from what slots cost and what the adapters in a directory need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_multilora.integration.offline.base_model import BaseModel, SlotMemory
from vllm_multilora.toolbox.planning.adapter_survey import Survey, SurveyedAdapter


@dataclass(frozen=True)
class RankNeed:
    """What slots of one rank would cost, and whom they would leave out.

    Attributes:
        rank: The slots' rank.
        fits: How many of the adapters fit.
        left_out: The names of those that do not.
        bytes: What all slots take.
    """

    rank: int
    fits: int
    left_out: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class UnusedLayers:
    """Layers that no adapter touches, and that cost slots all the same.

    Attributes:
        suffixes: Their names' last parts.
        targets: The others': what `--lora-target-modules` would be.
        bytes: What all slots take in them.
    """

    suffixes: tuple[str, ...]
    targets: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Advice:
    """What a directory's adapters say about a server's settings.

    Attributes:
        max_lora_rank: The smallest setting that serves all of them.
        needs: What each smaller setting would save, and that one itself, ascending.
        unused: Layers that slots are allocated for and no adapter needs; None if there are none.
    """

    max_lora_rank: int
    needs: tuple[RankNeed, ...]
    unused: UnusedLayers | None

    @property
    def outliers(self) -> tuple[RankNeed, RankNeed] | None:
        """The setting without those that need the largest rank, and the one with them."""
        return (self.needs[-2], self.needs[-1]) if len(self.needs) > 1 else None


def advise(model: BaseModel, survey: Survey, slots: int) -> Advice | None:
    """What the adapters of a directory need; None if none of them can be served.

    Args:
        model: The base model.
        survey: The adapters; its layout had the largest of the model's ranks.
        slots: `max_loras`.
    """
    if not survey.adapters:
        return None
    # An adapter in the survey fits the model's largest rank, or it would have been refused.
    needed = sorted({model.rank_for(adapter.rank) for adapter in survey.adapters})
    highest = needed[-1]
    return Advice(
        highest,
        tuple(_need(survey.adapters, model.by_rank[rank], slots) for rank in needed),
        _unused(model.by_rank[highest], survey.adapters, slots),
    )


def _need(adapters: Iterable[SurveyedAdapter], memory: SlotMemory, slots: int) -> RankNeed:
    left_out = tuple(adapter.name for adapter in adapters if adapter.rank > memory.rank)
    fits = sum(adapter.rank <= memory.rank for adapter in adapters)
    return RankNeed(memory.rank, fits, left_out, memory.total(slots))


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
        slots * sum(layer.slot_bytes for layer in unused)
        + sum(layer.fixed_bytes for layer in unused),
    )
