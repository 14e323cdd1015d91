"""The executor class: what vLLM's engine core calls for single adapters, and for sleep.

An engine core hands all such calls on to its executor, whose class vLLM's configuration names. Ours
is derived from the class that the configuration says. It starts the workers with a link to the
engine core, chooses the scheduler class, and answers what vLLM's executors would ask of workers.
"""

from __future__ import annotations

import importlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import lru_cache, partial
from threading import Timer
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import proxy, ref

from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.worker.worker_base import WorkerBase

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.engine.adapter_status import METHOD, REGISTER, Report, engine_report
from vllm_multilora.integration.engine.adapters.quarantine import RELOADS
from vllm_multilora.integration.engine.core import make_adapters, starting_workers
from vllm_multilora.integration.engine.requests.tenant_wall import TenantWallMixin, has_wall
from vllm_multilora.integration.engine.scheduling.fair_scheduler import FairSharesMixin
from vllm_multilora.integration.engine.scheduling.older_scheduler import with_newer_parts
from vllm_multilora.integration.engine.scheduling.scheduler import AdapterAwareMixin, as_sent
from vllm_multilora.integration.engine.status_port import serve_status
from vllm_multilora.integration.engine.workers.reaching import REACHED
from vllm_multilora.integration.failed_requests import AdapterRefusedError, not_by_workers
from vllm_multilora.integration.patching.activation import loads_adapters, settings_of
from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.sources.source_url import is_source
from vllm_multilora.states import AT_HAND

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.executor import Executor

    from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters

logger = logging.getLogger(__name__)

_IDLE_S = 0.001
_PACKAGE = __name__.partition(".")[0]
_MARK = "AdapterExecutor:"
_OF_SINGLE_ADAPTERS = frozenset({"add_lora", "remove_lora", "pin_lora"})
_WATCHED = frozenset(
    {METHOD, REGISTER, "list_loras", "sleep", "wake_up", *RELOADS, *_OF_SINGLE_ADAPTERS}
)
"""Calls of workers that are answered here, or have a consequence here."""

_T = TypeVar("_T")


class AdapterExecutorMixin:
    """An executor that loads adapters by a store, with the scheduler's decisions about slots.

    Where vLLM loads the adapters, it does no more than choose the scheduler.

    Attributes:
        inputs: The queue that wakes the engine core; None where its caller takes the steps.
    """

    if TYPE_CHECKING:
        vllm_config: VllmConfig

    inputs: Any = None

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self._scheduler: Callable[[], AdapterAwareMixin | None] = lambda: None
        with starting_workers(self, vllm_config):
            super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        scheduler_config = vllm_config.scheduler_config
        chosen = scheduler_config.get_scheduler_cls()
        scheduler_config.scheduler_cls = scheduler_over(chosen, vllm_config, self)

    def serve(self, scheduler: AdapterAwareMixin) -> None:
        """Takes the scheduler of its engine core, which has just been made."""
        self._scheduler = ref(scheduler)  # no circle: the scheduler goes when its engine core does
        serve_status(self.vllm_config, self.report_soon)

    def serve_from(self, inputs: Any) -> None:
        """Takes the queue of its engine core, which has a process of its own."""
        self.inputs = inputs

    def report_soon(self) -> Future[list[Report]]:
        """What the engine core tells of its adapters, once it has time; any thread may ask."""
        answer: Future[list[Report]] = Future()

        def report() -> None:
            try:
                answer.set_result(self._report([]))
            except Exception as error:
                answer.set_exception(error)

        if self.inputs is None:  # the caller of the engine takes the steps, or none
            report()
        else:
            self.scheduler.deferred_calls.say_later(report)
            _wake(self.inputs)
        return answer

    def connect(self) -> EngineAdapters | None:
        """The adapters of the engine, made when first asked for; None where vLLM loads them."""
        scheduler = self._scheduler()
        if scheduler is None:
            return None
        if not scheduler.is_connected:
            wake = None if self.inputs is None else partial(_wake, self.inputs)
            scheduler.attach_adapters(make_adapters(self, scheduler, wake))
        return scheduler.adapters

    @property
    def scheduler(self) -> AdapterAwareMixin:
        """The scheduler of its engine core; made after the executor."""
        scheduler = self._scheduler()
        assert scheduler is not None
        return scheduler

    # What vLLM calls

    def collective_rpc(
        self,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *more: Any,
        **others: Any,
    ) -> Any:
        """Calls a method of all workers; answers those that are not theirs itself.

        Raises:
            MultiLoRAError: Workers are to load, unload or pin an adapter: no request would use it.
        """
        ask = super().collective_rpc  # type: ignore[misc]
        if method not in _WATCHED:
            done = ask(method, timeout, args, kwargs, *more, **others)
            is_awaited = not (more or others)
            return self._with_pushed(done) if is_awaited and _may_push(method) else done
        if method == METHOD:
            return self._report(*args)
        if method == REGISTER:
            return self._register_for_server(*args)
        if method == "list_loras" and (adapters := self.connect()) is not None:
            # Workers know only their slots. Frameworks use no adapter that is not listed.
            listed = (e.number for e in adapters.known() if e.state in AT_HAND)
            return [{*listed, *adapters.pushed.numbers()}]
        if method in _OF_SINGLE_ADAPTERS and self.connect() is not None:
            raise not_by_workers(method.removesuffix("_lora"))
        if method == "sleep":
            ask(worker_calls.slots_away)
        done = ask(method, timeout, args, kwargs, *more, **others)
        if method == "wake_up" and _has_weights(*args, **(kwargs or {})):
            # Also after a sleep of level 1, which loses nothing: vLLM does not say which it was.
            ask(worker_calls.slots_lost)
            if (adapters := self.connect()) is not None:
                adapters.slots_lost()
        elif method in RELOADS and (scheduler := self._scheduler()) and scheduler.adapters:
            scheduler.adapters.quarantine.base_reloaded(scheduler.requests)
        return done

    def _with_pushed(self, done: Any) -> Any:
        """A call's result, once the adapters have been checked that workers were given by it.

        Raises:
            AdapterRefusedError: One cannot be served: the version before serves on. The result is
                a future as for `add_lora`, if there is any such adapter.
        """
        if self._scheduler() is None:
            return done
        taken = super().collective_rpc(worker_calls.take_pushed)  # type: ignore[misc]
        pushes = [push for of_worker in taken for push in of_worker]
        adapters = self.connect() if pushes else None
        if adapters is None:
            return done
        if REACHED.get(self):
            raise MultiLoRAError(
                "adapters can be given to workers as tensors on one machine only, and this engine "
                "has workers on others: write the adapter to a folder that all of them see, and "
                "call add_lora of the engine with its path"
            )

        def settle() -> Future[Any]:
            futures = [
                self._remove(adapters, push.number) if push.folder is None else adapters.push(push)
                for push in pushes
            ]
            answer: Future[Any] = Future()

            def note(_: Future[bool]) -> None:
                if all(future.done() for future in futures) and not answer.done():
                    errors = [e for future in futures if (e := future.exception()) is not None]
                    answer.set_exception(errors[0]) if errors else answer.set_result(done)

            for future in futures:
                future.add_done_callback(note)
            return answer

        return self._carry_out(adapters, settle)

    def _report(self, asked: list[int]) -> list[dict[str, Any]]:
        if (adapters := self.connect()) is None:
            return []
        return [engine_report(adapters, self.scheduler.users.accepted, asked)]

    def add_lora(self, lora_request: LoRARequest) -> bool | Future[bool]:
        """Registers an adapter: vLLM's `add_lora`, with the reading done by the store.

        Returns:
            True, as vLLM's own answer is. A future where vLLM's engine core process answers a
            client's call with it; the result itself in an engine core that is called directly.

        Raises:
            AdapterRefusedError: The adapter cannot be served; the future holds it likewise.
        """
        adapters = self.connect()
        if adapters is None:
            return super().add_lora(lora_request)  # type: ignore[misc]
        request = as_sent(lora_request)
        if _is_for_workers(request):
            loaded = super().collective_rpc("add_lora", args=(request,))  # type: ignore[misc]
            return self._with_pushed(all(loaded))
        return self._carry_out(adapters, partial(self._register, adapters, request))

    def _register(
        self, adapters: EngineAdapters, request: LoRARequest, *, in_flight: bool = False
    ) -> Future[bool]:
        registered = adapters.register(request, in_flight=in_flight)
        if not (registered.done() and registered.exception()):
            # It may have been about to go, as one does whose folder is put back as it was.
            number = request.lora_int_id
            self.scheduler.users.keep({number, *adapters.blends_with(number)})
        return registered

    def _register_for_server(self, fields: dict[str, Any]) -> Any:
        """Registers an adapter as `add_lora`, and answers with what was read.

        Returns:
            What `registered_version` reads, or `AdapterRefusedError.as_dict`; as a future as for
            `add_lora`.
        """
        adapters, request = self.connect(), LoRARequest(**fields)
        assert adapters is not None

        def register() -> Future[dict[str, Any]]:
            answer: Future[dict[str, Any]] = Future()
            in_flight = request.load_inplace  # else each version has a number of its own
            registered = self._register(adapters, as_sent(request), in_flight=in_flight)
            registered.add_done_callback(partial(_answer, answer, adapters, request.lora_int_id))
            return answer

        return self._carry_out(adapters, register)

    def remove_lora(self, lora_id: int) -> bool | Future[bool]:
        """Removes an adapter: vLLM's `remove_lora`, once no request uses the adapter any more.

        The blends that it is a part of are removed likewise. One that is registered again meanwhile
        stays, with its blends.

        Returns:
            Whether the adapter was known; as a future as for `add_lora`. An engine core that is
            called directly does not wait for requests, which go on, or are ended, in its caller's
            next steps.
        """
        adapters = self.connect()
        if adapters is None:
            return super().remove_lora(lora_id)  # type: ignore[misc]
        return self._carry_out(adapters, partial(self._remove, adapters, lora_id))

    def _remove(self, adapters: EngineAdapters, lora_id: int) -> Future[bool]:
        limit_s = settings_of(self.vllm_config).unload_timeout_s
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
            self.scheduler.retire_adapter(number, limit_s, partial(remove_one, number))
            for number in left
        ]
        if not any(are_used):
            return future
        if self.inputs is None:  # it is the caller who takes the steps
            is_known: Future[bool] = Future()
            is_known.set_result(True)
            return is_known
        # An engine that is paused, or has nothing but sessions without input, takes no steps.
        timer = Timer(limit_s, _wake, args=(self.inputs,))
        timer.daemon = True
        timer.start()
        future.add_done_callback(lambda done: timer.cancel())
        return future

    def pin_lora(self, lora_id: int) -> bool | Future[bool]:
        """Pins an adapter; returns as `add_lora`."""
        adapters = self.connect()
        if adapters is None:
            return super().pin_lora(lora_id)  # type: ignore[misc]
        return self._carry_out(adapters, partial(adapters.pin, lora_id))

    def _carry_out(
        self, adapters: EngineAdapters, call: Callable[[], Future[_T]]
    ) -> _T | Future[_T]:
        """Has a call carried out and answered; both where they hold up no step."""
        deferred_calls = self.scheduler.deferred_calls
        answer: Future[_T] = Future()
        pass_on = partial(_pass_on, answer)

        def carry_out() -> None:
            try:
                future = call()
            except Exception as error:
                answer.set_exception(error)
            else:
                future.add_done_callback(lambda done: deferred_calls.say(partial(pass_on, done)))

        deferred_calls.say(carry_out)
        if self.inputs is not None:
            return answer
        while not answer.done():
            # Nobody takes a step meanwhile in which one of those that wait for slots could get one.
            adapters.yield_host_memory()
            time.sleep(_IDLE_S)
            adapters.poll()
            self.scheduler.swap_in_flight(adapters)
        return answer.result()


def _may_push(method: Any) -> bool:
    """Whether a call of workers may give them adapters: one that is neither vLLM's nor ours."""
    if isinstance(method, str):
        return not hasattr(WorkerBase, method)
    return (getattr(method, "__module__", None) or "").partition(".")[0] != _PACKAGE


def _is_for_workers(request: LoRARequest) -> bool:
    """Whether a framework's own code has to load an adapter: it is in no folder."""
    path = request.lora_path
    is_foreign = "://" in path and not (is_blend(path) or is_source(path))
    return is_foreign or bool(getattr(request, "lora_tensors", None))


def _wake(inputs: Any) -> None:
    """Has an engine core look for what there is to do, from any thread."""
    inputs.put_nowait((EngineCoreRequestType.WAKEUP, None))


def _pass_on(answer: Future[_T], done: Future[_T]) -> None:
    """Gives a future another one's result, or its error."""
    if (error := done.exception()) is not None:
        answer.set_exception(error)
    else:
        answer.set_result(done.result())


def _answer(
    answer: Future[dict[str, Any]], adapters: EngineAdapters, adapter: int, done: Future[bool]
) -> None:
    """Answers a server's registration."""
    error, version = done.exception(), adapters.version(adapter)
    if isinstance(error, AdapterRefusedError):
        logger.warning("Adapter refused: %s", error.in_one_line())
        answer.set_result(error.as_dict())
    elif error is not None:
        answer.set_exception(error)
    elif version is None:
        answer.set_result({})
    else:
        tokens = list(version.invocation_tokens)
        answer.set_result({"digest": version.digest, "kind": version.kind, "invocation": tokens})


def _has_weights(tags: list[str] | None = None) -> bool:
    return tags is None or "weights" in tags


def scheduler_over(
    scheduler: type, vllm_config: Any, executor: AdapterExecutorMixin | None = None
) -> type:
    """The scheduler class of an engine, over the one that vLLM chose.

    Where the plugin loads the adapters it is an `AdapterAwareMixin`, and a `FairSharesMixin` where
    shares are fair. Where there are tenants, a `TenantWallMixin` stands in front.
    """
    mixins: list[type] = [TenantWallMixin] if has_wall(vllm_config) else []
    if loads_adapters(vllm_config):
        is_fair = _shares_fairly(scheduler, vllm_config)
        mixins.append(FairSharesMixin if is_fair else AdapterAwareMixin)
        scheduler = with_newer_parts(scheduler)
    beside = {} if executor is None else {"executor": proxy(executor)}
    return type(scheduler)(f"MultiLoRA{scheduler.__name__}", (*mixins, scheduler), beside)


def _shares_fairly(scheduler: type, vllm_config: Any) -> bool:
    if not settings_of(vllm_config).fair_shares:
        return False
    policy = vllm_config.scheduler_config.policy
    if policy != "fcfs":
        logger.info(
            "Fair shares are off: requests are served by vLLM's --scheduling-policy %s.", policy
        )
        return False
    if not hasattr(scheduler, "_reserve_prefill_lookahead"):
        logger.warning(
            "Fair shares are off: %s does not ask how much of a prompt to compute in a step, as "
            "those of the supported vLLM versions do.",
            scheduler.__name__,
        )
        return False
    return True


# The class


@lru_cache
def adapter_loading(executor: type[Executor]) -> type[Executor]:
    """An executor class of vLLM's, or of a user's, that loads adapters by the plugin.

    Other processes find it by its name, see `__getattr__`.
    """
    name = f"{executor.__module__}.{executor.__qualname__}".replace(".", "/")
    metaclass: Any = type(executor)
    bases = (AdapterExecutorMixin, executor)
    made: type[Executor] = metaclass(f"Adapter{executor.__name__}", bases, {})
    made.__module__, made.__qualname__ = __name__, f"{_MARK}{name}"
    return made


def __getattr__(name: str) -> Any:
    """Finds the class that another process has made by `adapter_loading`, for pickle."""
    if not name.startswith(_MARK):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, found = name.removeprefix(_MARK).replace("/", ".").rpartition(".")
    return adapter_loading(getattr(importlib.import_module(module), found))


def get_class(original: Callable[..., type[Executor]], vllm_config: VllmConfig) -> type[Executor]:
    executor = original(vllm_config)
    # A wall for tenants takes a scheduler of ours, also where vLLM loads the adapters.
    acts = loads_adapters(vllm_config) or has_wall(vllm_config)
    is_ours = issubclass(executor, AdapterExecutorMixin)
    return adapter_loading(executor) if acts and not is_ours else executor


def process_input_sockets(
    original: Callable[..., None], engine_core: Any, *args: Any, **kwargs: Any
) -> None:
    executor = engine_core.model_executor
    if isinstance(executor, AdapterExecutorMixin):
        executor.serve_from(engine_core.input_queue)
    original(engine_core, *args, **kwargs)
