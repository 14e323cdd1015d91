"""The engine core's part: connects the store, the workers and the scheduler."""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.util import register_after_fork
from threading import Timer
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from vllm_multilora.adapters.layout import ModelLayout
from vllm_multilora.adapters.required import RequiredDigests
from vllm_multilora.integration import kv_blocks
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine import invocation, prefix_keys
from vllm_multilora.integration.engine.adapters import ADAPTERS, EngineAdapters
from vllm_multilora.integration.engine.machines import MachineStores
from vllm_multilora.integration.engine.observer import AdapterObserver
from vllm_multilora.integration.engine.parties import Store, Workers
from vllm_multilora.integration.engine.reaching import REACHED, reach
from vllm_multilora.integration.engine.scheduler import AdapterAwareMixin
from vllm_multilora.integration.engine.workers import LinkedWorkers, WaitingStore, WaitingWorkers
from vllm_multilora.integration.failures import (
    AdapterRefusedError,
    RefusalsInOneLine,
    SentRefusalError,
)
from vllm_multilora.integration.fill_link import LINK, PATH_VARIABLE, FillLink
from vllm_multilora.integration.logs import join_vllm_logging
from vllm_multilora.integration.metrics import server_of
from vllm_multilora.integration.patching.activation import loads_adapters, settings_of
from vllm_multilora.integration.patching.cache_settings import cpu_budget, store_settings
from vllm_multilora.integration.tenant_of_request import take_tenant
from vllm_multilora.integration.worker import calls
from vllm_multilora.slots.assignment import COPY_S, SlotAssignment
from vllm_multilora.slots.contained_policy import ContainedPolicy
from vllm_multilora.slots.registry import make_policy
from vllm_multilora.states import AT_HAND
from vllm_multilora.store.client import StoreClient
from vllm_multilora.store.folder import StoreUnavailableError
from vllm_multilora.wording import counted

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    from vllm_multilora.store.messages import PackInfo

logger = logging.getLogger(__name__)

_IDLE_S = 0.001
_REFUSALS_IN_ONE_LINE = RefusalsInOneLine()
_D = TypeVar("_D")
_T = TypeVar("_T")

SERVER: Attached[str] = Attached("server")
"""What an executor's server was called when its workers started."""

EARLY_STORE: Attached[StoreClient | None] = Attached("early-store")
"""What keeps this machine's store up until an executor's engine core has connected to it."""


@contextmanager
def starting_workers(executor: Any, vllm_config: VllmConfig) -> Iterator[None]:
    """Wraps the start of an executor and its workers, which connect to their link meanwhile.

    The store starts beside them, since an engine waits for it as soon as its model is loaded.

    Args:
        executor: Gets the link as its `LINK`; None if its workers cannot be heard. Gets what keeps
            the store up as its `EARLY_STORE`, and its server's name as its `SERVER`.
        vllm_config: Of the engine.
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
    if not all(executor.collective_rpc(calls.has_our_manager)):
        _disconnect(executor)  # vLLM itself, or another program, loads the adapters
        return
    machines = reach(executor, link, missing, vllm_config)
    if machines is None:
        logger.warning(
            "Workers %s, which are on other machines, do not reach their engine core: the engine "
            "will wait while adapters are loaded.",
            ", ".join(map(str, missing)),
        )
        _disconnect(executor)
        return
    others = counted(len(machines), "other machine")
    logger.info("Adapters are loaded in the background on %s.", others)
    REACHED.set(executor, machines)


def _make_link(vllm_config: VllmConfig) -> FillLink | None:
    if not loads_adapters(vllm_config) or not settings_of(vllm_config).async_loading:
        return None
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend == "external_launcher":
        # Each worker has an engine core of its own (torchrun). They do not talk to each other, and
        # have to take the same steps: all wait for the same loads.
        return None
    if parallel.node_rank_within_dp:
        return None  # an executor of another machine's engine core, to which its workers answer
    try:
        link = FillLink(vllm_config.parallel_config.world_size)
    except (OSError, StoreUnavailableError) as error:
        logger.warning("Adapters cannot be loaded in the background here: %s", error)
        return None
    os.environ[PATH_VARIABLE] = str(link.path)
    return link


def _disconnect(executor: Any) -> None:
    _close(executor, LINK)
    _close(executor, EARLY_STORE)


def _close(executor: Any, attached: Attached[Any]) -> None:
    if (connection := attached.get(executor)) is not None:
        connection.close()
        attached.set(executor, None)


def adapters_of(engine_core: Any) -> EngineAdapters | None:
    """The adapters of an engine core, made when first asked for; None where stock vLLM runs.

    vLLM loads its plugins while an engine core is being made, too late to take part in that.
    """
    if not ADAPTERS.is_set(engine_core):
        adapters = _make_adapters(engine_core)
        ADAPTERS.set(engine_core, adapters)
        if adapters is not None:
            engine_core.scheduler.attach_adapters(adapters)
    return ADAPTERS.get(engine_core)


def _make_adapters(engine_core: Any) -> EngineAdapters | None:
    executor, scheduler = engine_core.model_executor, engine_core.scheduler
    vllm_config: VllmConfig = engine_core.vllm_config
    if not isinstance(scheduler, AdapterAwareMixin):
        return None
    workers_have_ours = executor.collective_rpc(calls.has_our_manager)
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
    observer.serves_with(executor.collective_rpc(calls.kernels_in_use)[0])
    slots = SlotAssignment(
        lora_config.max_loras,
        ContainedPolicy(make_policy(settings.cache_policy)),
        observer,
        ranks=ranks,
        pinned_names=settings.pin,
    )
    store, workers = _connect(engine_core, executor, vllm_config)
    asks_late = isinstance(store, WaitingStore)
    # Workers that have a step already begin with copies after it; and what depends on the clock
    # would have an external launcher's engines take different steps.
    can_wait = vllm_config.max_concurrent_batches == 1 and not asks_late
    return EngineAdapters(
        store,
        workers,
        slots,
        ranks,
        observer,
        asks_late=asks_late,
        copy_s=COPY_S if can_wait else 0.0,
        store_address=getattr(store, "address", ""),
        required=RequiredDigests(settings.require_digest) if settings.require_digest else None,
        signing_keys=settings.signing_keys,
        most_blends=settings.max_blends,
    )


def _connect(engine_core: Any, executor: Any, vllm_config: VllmConfig) -> tuple[Store, Workers]:
    """The store and the workers; through them, and waiting for them, where that is all there is."""
    link = LINK.get(executor)
    # In an engine core process, vLLM has renamed its instance since: each engine's differently.
    server = SERVER.get(executor) or server_of(vllm_config)
    if link is None:
        executor.collective_rpc(calls.open_own_store, args=(server,))
        workers = WaitingWorkers(executor.collective_rpc)
        return WaitingStore(executor.collective_rpc), workers
    store = _open_stores(executor, vllm_config, server)
    asides = engine_core.scheduler.asides
    store.say_by(asides.say, asides.flush)
    if hasattr(engine_core, "input_queue"):
        asides.wait = isinstance(executor, MultiprocExecutor)
        wake = partial(_wake, engine_core.input_queue)
        store.start_waking(wake)
        link.start_waking(wake)
    elsewhere = store.elsewhere if isinstance(store, MachineStores) else None
    return store, LinkedWorkers(executor.collective_rpc, link, elsewhere)


def _wake(inputs: Any) -> None:
    """Has an engine core look for what there is to do, from any thread."""
    inputs.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _open_stores(
    executor: Any, vllm_config: VllmConfig, server: str
) -> StoreClient | MachineStores:
    """The stores of all machines that have workers, each told what its workers accept."""
    settings, remote = settings_of(vllm_config), REACHED.get(executor) or []
    away = {rank for machine in remote for rank in machine.ranks}
    here = [r for r in range(vllm_config.parallel_config.world_size) if r not in away]
    clients = [StoreClient.connect(settings.store, server)] if here else []  # type: ignore[arg-type]
    _close(executor, EARLY_STORE)
    machines = [(here, client.address) for client in clients]
    clients += [StoreClient(machine.store, server) for machine in remote]
    machines += [(machine.ranks, machine.address) for machine in remote]
    described = executor.collective_rpc(calls.open_memory, args=(machines, server))
    for client, (ranks, _) in zip(clients, machines, strict=True):
        layouts = [msgspec.msgpack.decode(described[r][0], type=ModelLayout) for r in ranks]
        largest = sum(described[rank][1] for rank in ranks)
        budget = cpu_budget(settings, vllm_config, largest_adapter=largest)
        for note in client.configure(layouts, store_settings(settings, budget)):
            logger.warning("Adapter store: %s", note)
    return clients[0] if len(clients) == 1 else MachineStores(clients)


# What vLLM calls


def init_executor(
    original: Callable[..., None], self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any
) -> None:
    with starting_workers(self, vllm_config):
        original(self, vllm_config, *args, **kwargs)


def preprocess_add_request(original: Callable[..., Any], engine_core: Any, request: Any) -> Any:
    """Makes vLLM's request of a client's; one with an adapter gets its adapter's keys."""
    lora = request.lora_request
    if lora is None or not isinstance(engine_core.scheduler, AdapterAwareMixin):
        return original(engine_core, request)
    request.lora_request = lora = _as_sent(lora)
    # One thread makes all requests, so that nobody else sees the hasher missing.
    hasher, engine_core.request_block_hasher = engine_core.request_block_hasher, None
    try:
        made, wave = original(engine_core, request)
    finally:
        engine_core.request_block_hasher = hasher
    prefix_keys.withhold(made, hasher)
    adapters = ADAPTERS.get(engine_core)
    version = None if adapters is None else adapters.version(lora.lora_int_id)
    if version is not None and invocation.is_invoked(made, version):
        prefix_keys.set_version(made, version.digest)
    return made, wave


def _as_sent(lora: LoRARequest) -> LoRARequest:
    """What a message to an engine core can hold of it: `LLM` may call one in its own process.

    Raises:
        TypeError: Its number is none, or its path is none.
    """
    number, path = int(operator.index(lora.lora_int_id)), os.fsdecode(lora.lora_path)
    return msgspec.structs.replace(lora, lora_int_id=number, lora_path=path)


def add_request(
    original: Callable[..., Any], self: Any, request: Request, *args: Any, **kwargs: Any
) -> Any:
    adapters_of(self)
    take_tenant(request)
    return original(self, request, *args, **kwargs)


def add_lora(
    original: Callable[..., bool], engine_core: Any, request: LoRARequest
) -> bool | str | Future[bool | str]:
    """Registers an adapter: vLLM's `add_lora`, with the reading done by the store.

    Returns:
        What was read: its digest, and after colons its kind, if it is not a plain one, and the
        tokens that activate it, if any do; true, as vLLM's own answer is. A future where vLLM's
        engine core process answers a client's call with it; the result itself in an engine core
        that is called directly.

    Raises:
        AdapterRefusedError: The adapter cannot be served; the future holds it likewise.
    """
    adapters = adapters_of(engine_core)
    if adapters is None:
        return original(engine_core, request)
    request = _as_sent(request)

    def register() -> Future[bool | str]:
        read: Future[bool | str] = Future()

        def what(_: bool) -> bool | str:
            version = adapters.version(request.lora_int_id)
            return True if version is None else _as_answer(version)

        def tell(registered: Future[bool]) -> None:
            error = registered.exception()
            if isinstance(error, AdapterRefusedError) and hasattr(engine_core, "input_queue"):
                read.set_exception(SentRefusalError(*error.args))
            else:
                _tell(read, what, registered)

        registered = adapters.register(request)
        if not (registered.done() and registered.exception()):
            # It may have been about to go, as one does whose folder is put back as it was.
            number = request.lora_int_id
            engine_core.scheduler.users.keep({number, *adapters.blends_with(number)})
        registered.add_done_callback(tell)
        return read

    return _carry_out(engine_core, adapters, register)


def _as_answer(version: PackInfo) -> str:
    if version.kind == "lora":
        return version.digest
    tokens = ",".join(map(str, version.invocation_tokens))
    return ":".join(filter(None, (version.digest, version.kind, tokens)))


def remove_lora(
    original: Callable[..., bool], engine_core: Any, lora_id: int
) -> bool | Future[bool]:
    """Removes an adapter: vLLM's `remove_lora`, once no request uses the adapter any more.

    The blends that it is a part of are removed likewise. One that is registered again meanwhile
    stays, with its blends.

    Returns:
        Whether the adapter was known; as a future as for `add_lora`. An engine core that is called
        directly does not wait for requests, which go on, or are ended, in its caller's next steps.
    """
    adapters = adapters_of(engine_core)
    if adapters is None:
        return original(engine_core, lora_id)
    scheduler = engine_core.scheduler
    limit_s = settings_of(engine_core.vllm_config).unload_timeout_s

    def remove() -> Future[bool]:
        future: Future[bool] = Future()
        left = {lora_id, *adapters.blends_with(lora_id)}
        known: dict[int, bool] = {}

        def note(number: int, was_known: bool) -> None:
            known[number] = was_known
            if known.keys() == left:
                future.set_result(known[lora_id])

        def remove_one(number: int, leaves: bool) -> None:
            if leaves:
                gone = adapters.remove(number)
                gone.add_done_callback(lambda done: note(number, done.result()))
            else:
                note(number, True)

        are_used = [
            scheduler.retire_adapter(number, limit_s, partial(remove_one, number))
            for number in left
        ]
        if not any(are_used):
            return future
        if not hasattr(engine_core, "input_queue"):  # it is the caller who takes the steps
            is_known: Future[bool] = Future()
            is_known.set_result(True)
            return is_known
        # An engine that is paused, or has nothing but sessions without input, takes no steps.
        timer = Timer(limit_s, _wake, args=(engine_core.input_queue,))
        timer.daemon = True
        timer.start()
        future.add_done_callback(lambda done: timer.cancel())
        return future

    return _carry_out(engine_core, adapters, remove)


def pin_lora(original: Callable[..., bool], engine_core: Any, lora_id: int) -> bool | Future[bool]:
    """Pins an adapter; returns as `add_lora`."""
    adapters = adapters_of(engine_core)
    if adapters is None:
        return original(engine_core, lora_id)
    return _carry_out(engine_core, adapters, partial(adapters.pin, lora_id))


def list_loras(original: Callable[..., set[int]], engine_core: Any) -> set[int]:
    adapters = adapters_of(engine_core)
    if adapters is None:
        return original(engine_core)
    return {each.number for each in adapters.known() if each.state(adapters.slots) in AT_HAND}


def wake_up(original: Callable[..., Any], engine_core: Any, tags: Any = None) -> Any:
    done = original(engine_core, tags)
    adapters = adapters_of(engine_core)
    if adapters is not None and (tags is None or "weights" in tags):
        adapters.slots_lost()
    return done


def _carry_out(
    engine_core: Any, adapters: EngineAdapters, call: Callable[[], Future[_T]]
) -> _T | Future[_T]:
    """Has a call carried out and answered; both where they hold up no step."""
    asides = engine_core.scheduler.asides
    answer: Future[_T] = Future()
    tell = partial(_tell, answer, lambda result: result)

    def carry_out() -> None:
        try:
            future = call()
        except Exception as error:
            answer.set_exception(error)
        else:
            future.add_done_callback(lambda done: asides.say(partial(tell, done)))

    asides.say(carry_out)
    if hasattr(engine_core, "input_queue"):
        return answer
    while not answer.done():
        # Nobody takes a step meanwhile in which one of those that wait for slots could get one.
        adapters.yield_host_memory()
        time.sleep(_IDLE_S)
        adapters.poll()
    return answer.result()


def _tell(told: Future[_T], what: Callable[[_D], _T], done: Future[_D]) -> None:
    """Has a future say what follows from another one's result, or its error."""
    if (error := done.exception()) is not None:
        told.set_exception(error)
    else:
        told.set_result(what(done.result()))
