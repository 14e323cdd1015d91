"""What the engine core asks of its workers, as functions that vLLM sends to them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_multilora.integration.worker.kernel_choice.reporting import kernel_rows
from vllm_multilora.integration.worker.pushed_tensors import Push
from vllm_multilora.integration.worker_link.orders import Order
from vllm_multilora.integration.worker_link.remote_link import (
    LinkAddress,
    StoreRelay,
    dial,
    this_machine,
)
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.store_launch import store_host

if TYPE_CHECKING:
    from vllm_multilora.integration.worker.manager import MultiLoRAWorkerManager

logger = logging.getLogger(__name__)


def _manager(worker: Any) -> MultiLoRAWorkerManager:
    return worker.model_runner.lora_manager


def has_our_manager(worker: Any) -> bool:
    """Whether the worker's LoRA manager is ours (a patch may have found no target)."""
    from vllm_multilora.integration.worker.manager import manager_of

    return manager_of(worker.model_runner) is not None


def begin_serving(worker: Any) -> bool:
    """As `has_our_manager`; the first request of the engine follows."""
    runner, is_ours = worker.model_runner, has_our_manager(worker)
    if is_ours and not hasattr(runner, "input_batch"):  # vLLM's second one
        runner.lora_state.serve(runner)
    return is_ours


def reach_engine_core(worker: Any, address: LinkAddress) -> str | None:
    """Connects a worker that its engine core does not hear yet.

    Returns:
        What tells the worker's machine apart from others; None where the engine core hears the
        worker already, or cannot be reached.
    """
    if not has_our_manager(worker):
        return None
    try:
        return this_machine() if _manager(worker).reach_engine_core(address) else None
    except OSError as error:
        logger.warning(
            "This worker does not reach its engine core at %s, port %d: %s",
            address.host,
            address.port,
            error,
        )
        return None


def relay_store(worker: Any, address: LinkAddress, ranks: list[int], mode: str) -> str | None:
    """Connects the engine core to the store of a worker's machine, if the worker is one of these.

    Returns:
        Where that store listens; None: not this worker, or it cannot be connected.
    """
    rank = _manager(worker).rank
    if rank not in ranks:
        return None
    try:
        store = store_host(mode)  # type: ignore[arg-type]
        StoreRelay(store, lambda: dial(address, "store", rank))
    except (OSError, StoreUnavailableError) as error:  # the latter: its folder cannot be used
        logger.warning("The store of this worker's machine is not within reach: %s", error)
        return None
    return f"unix:{store.path}"


def open_memory(
    worker: Any, machines: list[tuple[list[int], str]], server: str
) -> tuple[bytes, int]:
    """Says where the stores are.

    Returns:
        What this worker accepts of an adapter, a `ModelLayout` in msgpack; and the bytes of the
        largest adapter that does.
    """
    manager = _manager(worker)
    machine = next(i for i, (ranks, _) in enumerate(machines) if manager.rank in ranks)
    ranks, address = machines[machine]
    place = ranks.index(manager.rank)
    manager.filler.open_memory(address, server, machine=machine, place=place)
    return msgspec.msgpack.encode(manager.model_manager.layout), manager.largest_adapter


def kernels_in_use(worker: Any) -> list[dict[str, str]]:
    return kernel_rows(_manager(worker).model_manager.kernel_record)


def take_pushed(worker: Any) -> list[Push]:
    """Adapters that the worker was given as tensors since the last call, or told to forget."""
    return _manager(worker).pushed.take() if has_our_manager(worker) else []


def carry_out(worker: Any, orders: list[Order]) -> None:
    """Begins with what has come together since the last call."""
    for order in orders:
        _manager(worker).begin(order)


def slots_away(worker: Any) -> None:
    """Waits until nothing is being copied into slots, and copies nothing: the worker will sleep."""
    if has_our_manager(worker):
        _manager(worker).filler.slots_away()


def slots_lost(worker: Any) -> None:
    """Empties the worker's slots, whose memory may not have survived its sleep."""
    if has_our_manager(worker):
        _manager(worker).slots_lost()
