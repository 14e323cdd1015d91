"""The engine core's part: sets up the gate through which requests wait for their adapters."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.v1.engine import EngineCoreRequestType

from vllm_multilora.cache.readiness_log import ReadinessLog
from vllm_multilora.cache.shared_segment import SharedSegmentError
from vllm_multilora.integration import prefix_keys, worker_calls
from vllm_multilora.integration.activation import kernel_backend, settings_of
from vllm_multilora.integration.adapter_gate import (
    AdapterGate,
    BackgroundGate,
    BlockingGate,
    create_log,
    seal_log,
)
from vllm_multilora.integration.scheduler import AdapterAwareMixin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

_POLL_S = 0.002


@contextmanager
def starting_workers(executor: Any, vllm_config: VllmConfig) -> Iterator[None]:
    """Wraps the start of an executor and its workers, which find the readiness log meanwhile.

    Args:
        executor: Gets the log as the attribute `multilora_log`; None if there is none.
        vllm_config: Of the engine.
    """
    executor.multilora_log = log = _create_log(vllm_config)
    if kernel_backend(vllm_config) != "vllm":
        prefix_keys.tells_versions_apart = True
    try:
        yield
    except BaseException:
        if log is not None:
            log.close()
        raise
    if log is not None and not seal_log(log):
        executor.multilora_log = None


def _create_log(vllm_config: VllmConfig) -> ReadinessLog | None:
    if kernel_backend(vllm_config) == "vllm" or not settings_of(vllm_config).async_loading:
        return None
    try:
        return create_log(vllm_config.instance_id, vllm_config.parallel_config.world_size)
    except SharedSegmentError as error:
        logger.warning("Adapters cannot be loaded in the background here: %s", error)
        return None


def gate_of(engine_core: Any) -> AdapterGate | None:
    """The gate of an engine core, made when it is first asked for; None where stock vLLM runs.

    vLLM loads its plugins while an engine core is being made, too late to take part in that.
    """
    if not hasattr(engine_core, "multilora_gate"):
        engine_core.multilora_gate = gate = _make_gate(engine_core)
        if gate is not None:
            engine_core.scheduler.attach_gate(gate)
    return engine_core.multilora_gate


def _make_gate(engine_core: Any) -> AdapterGate | None:
    executor = engine_core.model_executor
    if not isinstance(engine_core.scheduler, AdapterAwareMixin):
        return None
    if not all(executor.collective_rpc(worker_calls.has_our_manager)):
        return None
    log = getattr(executor, "multilora_log", None)
    if log is None:
        executor.collective_rpc(worker_calls.without_log)
        return BlockingGate(executor.collective_rpc)
    inputs: Any = getattr(engine_core, "input_queue", None)

    def wake() -> None:
        inputs.put_nowait((EngineCoreRequestType.WAKEUP, None))

    ranks = engine_core.vllm_config.parallel_config.world_size
    return BackgroundGate(executor.collective_rpc, log, ranks, wake if inputs is not None else None)


def register(
    engine_core: Any, request: LoRARequest, original: Callable[..., bool]
) -> bool | Future[bool]:
    """Registers an adapter: vLLM's `add_lora`, with the reading done in the background.

    Returns:
        A future where vLLM's engine core process answers a client's call with it; the result
        itself in an engine core that is called directly.

    Raises:
        LoadFailedError: The adapter cannot be served; the future holds it likewise.
    """
    gate = gate_of(engine_core)
    if gate is None:
        return original(engine_core, request)
    future = gate.register(request)
    if hasattr(engine_core, "input_queue"):
        return future
    while not future.done():
        time.sleep(_POLL_S)
        gate.poll()
    return future.result()


def unregister(
    engine_core: Any, lora_id: int, original: Callable[..., bool]
) -> bool | Future[bool]:
    """Removes an adapter: vLLM's `remove_lora`, once no request uses the adapter any more.

    Returns:
        Whether the adapter was known; as a future as for `register`.
    """
    gate = gate_of(engine_core)
    if gate is None:
        return original(engine_core, lora_id)
    future: Future[bool] = Future()

    def remove() -> None:
        gate.forget(lora_id)
        engine_core.scheduler.remove_adapter(lora_id)
        future.set_result(original(engine_core, lora_id))

    limit_s = settings_of(engine_core.vllm_config).unload_timeout_s
    engine_core.scheduler.retire_adapter(lora_id, limit_s, remove)
    return future if hasattr(engine_core, "input_queue") else future.result(timeout=0)
