"""Starts an executor's workers, and connects the store, the workers and the scheduler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.util import register_after_fork
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration import kv_blocks
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters
from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
from vllm_multilora.integration.engine.scheduling.scheduler import AdapterAwareMixin
from vllm_multilora.integration.engine.workers.machines import MachineStores
from vllm_multilora.integration.engine.workers.reaching import REACHED, reach
from vllm_multilora.integration.engine.workers.workers import LinkedWorkers
from vllm_multilora.integration.failed_requests import RefusalsInOneLine
from vllm_multilora.integration.logs import join_vllm_logging
from vllm_multilora.integration.patching.activation import loads_adapters, settings_of
from vllm_multilora.integration.recording import server_of
from vllm_multilora.integration.settings.cache_settings import cpu_budget, store_settings
from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.integration.worker_link.fill_link import LINK, PATH_VARIABLE, FillLink
from vllm_multilora.slots.assignment import COPY_S, SlotAssignment
from vllm_multilora.slots.policies.contained_policy import ContainedPolicy
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

_REFUSALS_IN_ONE_LINE = RefusalsInOneLine()

_MARGIN_S = 10.0
"""Seconds beyond the store's own limit for an adapter: others may be before it."""

SERVER: Attached[str] = Attached("server")
"""What an executor's server was called when its workers started."""

EARLY_STORE: Attached[StoreClient | None] = Attached("early-store")
"""What keeps this machine's store up until an executor's engine core has connected to it."""


@contextmanager
def starting_workers(executor: Any, vllm_config: VllmConfig) -> Iterator[None]:
    """Wraps the start of an executor and its workers, which connect to their link meanwhile.

    The store starts beside them, since an engine waits for it as soon as its model is loaded.
    """
    join_vllm_logging()
    server = server_of(vllm_config)
    SERVER.set(executor, server)
    link = _make_link(vllm_config)
    LINK.set(executor, link)
    if link is not None and settings_of(vllm_config).store == "process":  # no thread: workers fork
        with suppress(StoreUnavailableError):  # which is told where it is needed
            early = StoreClient.connect("process", server, role="observer")
            EARLY_STORE.set(executor, early)
            register_after_fork(early, StoreClient.close)  # workers would keep it, and never read
    if loads_adapters(vllm_config):
        logging.getLogger("vllm.v1.engine.core").addFilter(_REFUSALS_IN_ONE_LINE)
        if settings_of(vllm_config).quarantine:
            kv_blocks.start()
    try:
        yield
    except BaseException:
        _disconnect(executor)
        raise
    finally:
        os.environ.pop(PATH_VARIABLE, None)
    if link is None or not (missing := link.attach_all()):
        return
    if not all(executor.collective_rpc(worker_calls.has_our_manager)):
        _disconnect(executor)  # vLLM itself, or another program, loads the adapters
        return
    machines = reach(executor, link, missing, vllm_config)
    if machines is None:
        _disconnect(executor)
        raise MultiLoRAError(
            f"workers {', '.join(map(str, missing))}, which are on other machines, do not reach "
            f"their engine core; the log says why. Let them connect to any of its machine's TCP "
            f"ports, as vLLM's own messages need, or leave LoRA to vLLM with --no-multilora"
        )
    others = counted(len(machines), "other machine")
    logger.info("Adapters are loaded in the background on %s.", others)
    REACHED.set(executor, machines)


def _make_link(vllm_config: VllmConfig) -> FillLink | None:
    parallel = vllm_config.parallel_config
    # Workers of another machine's engine core answer to that.
    if not loads_adapters(vllm_config) or parallel.node_rank_within_dp:
        return None
    try:
        link = FillLink(1 if _is_alone(vllm_config) else parallel.world_size)
    except (OSError, StoreUnavailableError) as error:
        logger.warning("Workers cannot answer their engine core here: %s", error)
        return None
    os.environ[PATH_VARIABLE] = str(link.path)
    return link


def _is_alone(vllm_config: VllmConfig) -> bool:
    """Whether each worker has an engine core of its own (torchrun).

    They do not talk to each other, and have to take the same steps: all wait for the same loads.
    """
    return vllm_config.parallel_config.distributed_executor_backend == "external_launcher"


def _disconnect(executor: Any) -> None:
    _close(executor, LINK)
    _close(executor, EARLY_STORE)


def _close(executor: Any, attached: Attached[Any]) -> None:
    if (connection := attached.get(executor)) is not None:
        connection.close()
        attached.set(executor, None)


def make_adapters(
    executor: Any, scheduler: AdapterAwareMixin, wake: Callable[[], None] | None
) -> EngineAdapters | None:
    """Connects the store and an executor's workers.

    Returns:
        The engine's adapters; None where vLLM itself, or another program, loads them.
    """
    vllm_config: VllmConfig = executor.vllm_config
    workers_have_ours = executor.collective_rpc(worker_calls.begin_serving)
    if not all(workers_have_ours):
        return None
    lora_config = vllm_config.lora_config
    assert lora_config is not None
    settings = settings_of(vllm_config)
    ranks = len(workers_have_ours)
    observer = AdapterObserver(
        scheduler.recorder,
        scheduler.request_metrics,
        slots=lora_config.max_loras,
        max_rank=lora_config.max_lora_rank,
    )
    observer.serves_with(executor.collective_rpc(worker_calls.kernels_in_use)[0])
    slots = SlotAssignment(
        lora_config.max_loras,
        ContainedPolicy(make_policy(settings.cache_policy)),
        observer,
        ranks=ranks,
        pinned_names=settings.pin,
    )
    asks_late = _is_alone(vllm_config) or not settings.async_loading
    store, workers = _connect(executor, scheduler, wake, asks_late=asks_late)
    # Workers that have a step already begin with copies after it; and what depends on the clock
    # would have an external launcher's engines take different steps.
    can_wait = vllm_config.max_concurrent_batches == 1 and not asks_late
    return EngineAdapters(
        store,
        workers,
        slots,
        ranks,
        observer,
        wait_s=settings.load_timeout_s + _MARGIN_S if asks_late else 0.0,
        copy_s=COPY_S if can_wait else 0.0,
        store_address=store.address,
        required=RequiredDigests(settings.require_digest) if settings.require_digest else None,
        signing_keys=settings.signing_keys,
        most_blends=settings.max_blends,
        no_swaps=_no_swaps(vllm_config),
    )


def _no_swaps(vllm_config: VllmConfig) -> str:
    """Why running requests cannot go on with other weights; empty: they can."""
    if vllm_config.kv_transfer_config is not None:
        return "no swap in flight with a KV connector, which may share mixed KV blocks"
    if vllm_config.parallel_config.distributed_executor_backend == "ray":
        return "no swap in flight with Ray, whose workers may carry it out in different steps"
    return ""


def _connect(
    executor: Any,
    scheduler: AdapterAwareMixin,
    wake: Callable[[], None] | None,
    *,
    asks_late: bool,
) -> tuple[StoreClient | MachineStores, LinkedWorkers]:
    """The store and the workers.

    Raises:
        StoreUnavailableError: There is none, or workers cannot answer.
    """
    vllm_config: VllmConfig = executor.vllm_config
    link = LINK.get(executor)
    # In an engine core process, vLLM has renamed its instance since: each engine's differently.
    server = SERVER.get(executor) or server_of(vllm_config)
    store = _open_stores(executor, vllm_config, server)
    if link is None:
        raise StoreUnavailableError("workers cannot answer their engine core; the log says why")
    deferred_calls = scheduler.deferred_calls
    store.say_by(deferred_calls.say, deferred_calls.flush)
    if wake is not None:
        deferred_calls.wait = isinstance(executor, MultiprocExecutor) and not asks_late
        store.start_waking(wake)
        link.start_waking(wake)
    elsewhere = store.elsewhere if isinstance(store, MachineStores) else None
    return store, LinkedWorkers(executor.collective_rpc, link, elsewhere)


def _open_stores(
    executor: Any, vllm_config: VllmConfig, server: str
) -> StoreClient | MachineStores:
    """The stores of all machines that have workers, each told what its workers accept."""
    settings, remote = settings_of(vllm_config), REACHED.get(executor) or []
    away = {rank for machine in remote for rank in machine.ranks}
    parallel, is_alone = vllm_config.parallel_config, _is_alone(vllm_config)
    workers = [parallel.rank] if is_alone else range(parallel.world_size)
    here = [rank for rank in workers if rank not in away]
    clients = [StoreClient.connect(settings.store, server)] if here else []  # type: ignore[arg-type]
    _close(executor, EARLY_STORE)
    machines = [(here, client.address) for client in clients]
    clients += [StoreClient(machine.store, server) for machine in remote]
    machines += [(machine.ranks, machine.address) for machine in remote]
    answers = executor.collective_rpc(worker_calls.open_memory, args=(machines, server))
    described = dict(zip(workers, answers, strict=True))
    # Each worker's part of an adapter is an adapter of its own in the store that they share.
    parts = parallel.local_world_size if is_alone else 1
    for client, (ranks, _) in zip(clients, machines, strict=True):
        layouts = [msgspec.msgpack.decode(described[r][0], type=ModelLayout) for r in ranks]
        largest = parts * sum(described[rank][1] for rank in ranks)
        budget = cpu_budget(settings, vllm_config, largest_adapter=largest)
        if budget.adapters is not None:
            budget = replace(budget, adapters=parts * budget.adapters)
        for note in client.configure(layouts, store_settings(settings, budget)):
            logger.warning("Adapter store: %s", note)
    return clients[0] if len(clients) == 1 else MachineStores(clients)
