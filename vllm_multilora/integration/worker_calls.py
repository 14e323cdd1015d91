"""What the engine core asks of its workers, as functions that vLLM sends to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_multilora.cache.load_failures import LoadFailure

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.adapter_tiers import AdapterTiers


def _tiers(worker: Any) -> AdapterTiers:
    return worker.model_runner.lora_manager.tiers


def has_our_manager(worker: Any) -> bool:
    """Whether the worker's LoRA manager is ours (a patch may have found no target)."""
    from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

    return isinstance(getattr(worker.model_runner, "lora_manager", None), MultiLoRAWorkerManager)


def without_log(worker: Any) -> None:
    """Nobody reads the readiness log: some worker could not open it."""
    _tiers(worker).detach_log()


@dataclass(frozen=True)
class Prefetch:
    """Start to load an adapter in the background; the answer comes through the readiness log."""

    request: LoRARequest
    serial: int

    def carry_out(self, tiers: AdapterTiers) -> None:
        tiers.prefetch(self.request, self.serial)


@dataclass(frozen=True)
class Keep:
    """Put an adapter that was loaded for its registration into free host memory, if there is."""

    lora_id: int

    def carry_out(self, tiers: AdapterTiers) -> None:
        tiers.keep_staged(self.lora_id)


@dataclass(frozen=True)
class Drop:
    """Nobody waits for an adapter any more."""

    lora_id: int

    def carry_out(self, tiers: AdapterTiers) -> None:
        tiers.drop_staged(self.lora_id)


@dataclass(frozen=True)
class Place:
    """Copy an adapter into a spare slot, beside the steps; the answer comes through the log."""

    lora_id: int
    serial: int
    needed: frozenset[int]

    def carry_out(self, tiers: AdapterTiers) -> None:
        tiers.place_ahead(self.lora_id, self.serial, self.needed)


Order = Prefetch | Keep | Drop | Place


def carry_out(worker: Any, orders: list[Order]) -> None:
    """Carries out what has come together since the last call; quick, nothing is loaded here."""
    tiers = _tiers(worker)
    for order in orders:
        order.carry_out(tiers)
    tiers.settle()


def ensure(worker: Any, request: LoRARequest) -> LoadFailure | None:
    """Loads an adapter now, while the engine waits; returns why it cannot be had."""
    return _tiers(worker).ensure(request)


def problems(worker: Any, lora_id: int) -> list[dict[str, Any]]:
    """All that is wrong with an adapter that could not be loaded."""
    return _tiers(worker).problems(lora_id)
