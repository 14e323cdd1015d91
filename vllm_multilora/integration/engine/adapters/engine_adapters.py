"""The engine core's adapters: has the store load them, gives them slots, has workers fill these.

The store owns files and host memory and reports what it has; workers report when an order has been
carried out; slots are decided here. The scheduler asks in each step, and holds requests back until
their adapter is in its slot. Nothing blocks but for what is short: leases on what is in host memory
and copies of small adapters are waited for, a few milliseconds in a step.

```
 request_load ─► store: QUEUED, READING ─► Loaded, with a lease ─► bring ─► workers: Fill
                          └─► Failed                                          └─► Filled: lease back
```

Everything that happens is an event of one adapter's `AdapterMachine`, which decides what follows.
`KnownAdapters` holds these; `Exchange` has what they have asked the store and the workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.failures import FailureKind, LoadFailure, unexpected
from vllm_multilora.integration.engine.adapters.adapter_machine import ACTIVATED, AdapterMachine
from vllm_multilora.integration.engine.adapters.exchange import Exchange
from vllm_multilora.integration.engine.adapters.known_adapters import KnownAdapters
from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
from vllm_multilora.integration.engine.adapters.pushed_folders import PushedFolders
from vllm_multilora.integration.engine.adapters.quarantine import Quarantine
from vllm_multilora.integration.engine.workers.machines import MachineStores
from vllm_multilora.integration.engine.workers.workers import LinkedWorkers
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.worker_link.fill_link import Missing
from vllm_multilora.slots.assignment import AWAITED_BYTES, SlotAssignment
from vllm_multilora.states import AdapterState
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol import messages as msg

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_multilora.integration.seals import Seal
    from vllm_multilora.integration.worker.pushed_tensors import Push


_IDLE_S = 0.001
_NOT_IN_SLOT = LoadFailure(
    FailureKind.INTERNAL, "its weights were not in their slot when a step needed them"
)


class Registrations:
    """What registers an engine core's adapters: the part of `EngineAdapters` for operators."""

    slots: SlotAssignment
    quarantine: Quarantine
    pushed: PushedFolders
    version: Callable[[int], msg.PackInfo | None]
    _known: KnownAdapters
    _no_swaps: str
    _answered: Callable[[AdapterMachine, Future[bool]], Future[bool]]

    def register(self, request: LoRARequest, *, in_flight: bool = False) -> Future[bool]:
        """Has an adapter read and checked; holds an `AdapterRefusedError` if it cannot be served.

        That lifts its weights' quarantine, unless it is known or a request's, of a directory. With
        `in_flight`, which `load_inplace` goes with, running requests go on with it, and it is done
        when they do.
        """
        request = self.pushed.resolve(request)
        known = self._known.find(request.lora_int_id)
        if in_flight and (fault := self._swap_fault(known)):
            return _refused(request, FailureKind.INVALID, fault)
        undo = known and partial(self._undo, known, known.request.lora_path, known.is_in_flight)
        if in_flight and known is not None:
            self._known.move(known, request.lora_path)
        if (failure := self._known.refusal(request, "")) is not None:
            return _refused(request, failure.kind, failure.message)
        adapter = self._known.known_for(request)
        if request.load_inplace:
            adapter.is_in_flight = in_flight
        # A directory's number stands for one version of its files; others may have been read since.
        fresh = request.load_inplace or (
            adapter.number >= FIRST_NUMBER and adapter.pack is not None
        )
        future = adapter.registered(fresh=fresh)
        if undo and in_flight:
            future.add_done_callback(lambda done: undo() if done.exception() else None)
        is_first = adapter is not known and adapter.number < FIRST_NUMBER
        if request.load_inplace or is_first:  # anew
            future.add_done_callback(
                lambda done: self.quarantine.lift(None if done.exception() else adapter.serving)
            )
        return self._answered(adapter, future)

    def _swap_fault(self, adapter: AdapterMachine | None) -> str:
        """Why requests with an adapter cannot go on with other weights; empty if they can."""
        pins, slots = self.slots.pins, len(self.slots.contents)
        places = pins.places - (adapter is not None and adapter.number in pins)
        if self._no_swaps or slots - places < 2:
            found = f"found {slots} (--max-loras), {places} pinned for other adapters"
            return self._no_swaps or f"a swap in flight needs a slot beside the own one: {found}"
        is_activated = adapter is not None and adapter.pack and adapter.pack.invocation_tokens
        return ACTIVATED if is_activated else ""

    def _undo(self, adapter: AdapterMachine, path: str, was_in_flight: bool) -> None:
        if self._known.find(adapter.number) is adapter:
            self._known.move(adapter, path)
            adapter.is_in_flight = was_in_flight

    def push(self, push: Push) -> Future[bool]:
        """Registers what workers were given as tensors, in the place of the version before."""
        self.pushed.begin(push)
        request = LoRARequest(push.name, push.number, push.path, load_inplace=True)
        if what := unexpected(self.version(push.number), push.expected_version):
            future = _refused(request, FailureKind.CONFLICT, what)
        else:
            future = self.register(request, in_flight=push.in_flight)
        future.add_done_callback(
            lambda done: self.pushed.end(push, is_accepted=done.exception() is None)
        )
        return future


class EngineAdapters(Registrations):
    """An engine core's adapters; for its main thread only.

    Args:
        store: Loads adapters.
        workers: Fill slots.
        slots: Decides who has which.
        ranks: Number of workers.
        observer: Told of everything that is counted or shown.
        wait_s: Seconds that everybody waits for an adapter, which is then asked for only by a
            request that is about to run; 0: adapters are loaded beside steps.
        copy_s: Seconds that a step waits for copies of small adapters, from the first one on; 0
            where workers may still have a step when the next is scheduled.
        store_address: Tells stores apart.
        required: Which versions may be served; None: all.
        signing_keys: File of keys by one of which adapters must be signed; None: none need be.
        most_blends: Blends of each tenant that there may be at a time.
        no_swaps: Why running requests cannot go on with other weights; empty: they can.

    Attributes:
        slots, observer, store_address: As above.
        asks_late: Whether everybody waits for loads.
        quarantine: Weights that must not be used.
        pushed: The folders of adapters that workers were given as tensors.
    """

    def __init__(
        self,
        store: StoreClient | MachineStores,
        workers: LinkedWorkers,
        slots: SlotAssignment,
        ranks: int,
        observer: AdapterObserver,
        *,
        wait_s: float = 0.0,
        copy_s: float = 0.0,
        store_address: str = "",
        required: RequiredDigests | None = None,
        signing_keys: str | None = None,
        most_blends: int = 0,
        no_swaps: str = "",
    ) -> None:
        self.slots = slots
        self.asks_late, self._wait_s = wait_s > 0, wait_s
        self.store_address = store_address
        self.observer = observer
        self.quarantine = Quarantine()
        self.pushed = PushedFolders()
        self._exchange: Exchange[AdapterMachine] = Exchange(store, workers, ranks, signing_keys)
        self._known = KnownAdapters(self._exchange, slots, observer, required, most_blends)
        self._running: frozenset[int] = frozenset()
        self._copy_s, self._no_swaps = copy_s, no_swaps
        self._copies_until: float | None = None  # in this step; None: nothing is copied yet
        # Adapters that some worker was without in a step, and that as their failure.
        self._lost: dict[int, LoadFailure] = {}

    # What the scheduler asks

    def request_load(self, request: LoRARequest, tenant: Seal | None = None) -> LoadFailure | None:
        """A request for an adapter has arrived; returns why it cannot be served, in any case."""
        request = self.pushed.resolve(request)
        if (known := self._known.find(request.lora_int_id)) is not None and known.is_in_flight:
            # Its name may have been looked up before the path became another one.
            request = msgspec.structs.replace(request, lora_path=known.request.lora_path)
        owner = "" if tenant is None else tenant.tenant
        if (failure := self._known.refusal(request, owner)) is not None:
            return failure
        adapter = self._known.known_for(request, owner)
        adapter.requested(tenant, reload=request.load_inplace)
        if not self.asks_late:
            self._ask(adapter)
        return None

    def state(self, adapter_id: int) -> AdapterState:
        adapter = self._known.find(adapter_id)
        if adapter is None:
            return AdapterState.ABSENT
        if self.quarantine.failure(adapter.serving) is not None:
            return AdapterState.QUARANTINED
        return adapter.state

    def is_reloading(self, adapter_id: int) -> bool:
        """Whether the store has been asked for an adapter's reload, and has not answered."""
        adapter = self._known.find(adapter_id)
        return adapter is not None and adapter.is_reload_asked and adapter.load is not None

    def version(self, adapter_id: int) -> msg.PackInfo | None:
        """The newest version of an adapter's weights, None before it was loaded; any thread."""
        adapter = self._known.find(adapter_id)
        return None if adapter is None else adapter.pack

    def part(self, adapter_id: int, request: Request) -> tuple[Any, ...]:
        """What of a request that begins to run is the newest version's; see `Announcements`."""
        adapter = self._known[adapter_id]
        assert adapter.pack is not None
        if not adapter.is_in_flight:
            return (adapter.pack.digest,)
        answered = request.num_prompt_tokens if request.num_output_tokens else 0
        return adapter.pack.digest, adapter.updates, answered

    def swap(self) -> dict[int, tuple[str, int]]:
        """Versions that running requests go on with from this step on; see `Announcements.swap`."""
        if not self._known.swapping:
            return {}
        swapped = [adapter for adapter in list(self._known.swapping) if adapter.swap()]
        self._exchange.send()
        return {each.number: (each.pack.digest, each.updates) for each in swapped if each.pack}

    def begin_step(self, active: frozenset[int]) -> None:
        """A step is being scheduled, when these adapters have running requests."""
        self._copies_until = None
        if self._copy_s:  # else a step under way may have requests that have ended since
            self.slots.begin_step(active)

    def is_ready(self, adapter_id: int, *, reload: bool = False) -> bool:
        """Whether an adapter that requests wait for can be brought into a slot now, or is in one.

        Asks for one that has been lost meanwhile.
        """
        if self.failure(adapter_id, reload=reload) is not None:
            return False
        adapter = self._known[adapter_id]
        self._ask(adapter)
        if self.asks_late:
            _await_load(adapter, self._exchange, self._wait_s, self.poll)
        return self.failure(adapter_id, reload=reload) is None and adapter.is_at_hand

    def is_at_hand(self, adapter_id: int) -> bool:
        """Whether an adapter would use a slot now, as far as is known without asking for it."""
        adapter = self._known.find(adapter_id)
        return self.asks_late or (adapter is not None and adapter.is_at_hand)

    def bring(self, adapter_id: int) -> bool:
        """Whether an adapter that is ready is in its slot; has it copied into one if not.

        A small adapter's copy is waited for, if the step has time. Where no slot can be spared
        nothing happens: ask again in the next step.
        """
        adapter = self._known[adapter_id]
        before = self.slots.pack_in(adapter_id)
        if adapter.bring():
            return True
        pack = adapter.pack
        assert pack is not None
        if self.slots.pack_in(adapter_id) == before or pack.nbytes > AWAITED_BYTES:
            return False
        if self._copies_until is None:
            self._copies_until = time.monotonic() + self._copy_s
        until = self._copies_until
        while self.slots.is_awaited(adapter_id) and (left := until - time.monotonic()) > 0:
            self._exchange.send()
            self._poll(copy_s=left)
        return adapter.pack is pack and self.slots.admit(adapter_id, pack.pack)

    def running(self, adapters: frozenset[int], *, computes: bool = True) -> None:
        """Tells the adapters of all running requests; once a step, when it has been scheduled."""
        if adapters != self._running:
            found = [e for i in sorted(adapters) if (e := self._known.find(i)) is not None]
            self._exchange.store.used([e.pack.pack for e in found if e.pack and e.in_host])
            self._running = adapters
        self.slots.running(adapters)
        if computes:
            self.observer.step(adapters)
        self._exchange.send(self._wait_s, self._poll)

    def failure(self, adapter_id: int, *, reload: bool = False) -> LoadFailure | None:
        """Why an adapter cannot be had, None unless its state is FAILED or QUARANTINED.

        A reload that fails leaves the version before serving those that did not ask for it.
        """
        adapter = self._known.find(adapter_id)
        if adapter is None:
            return None
        failure = self.quarantine.failure(adapter.serving) or adapter.failure
        return failure or (adapter.reload_failure if reload else None)

    def take_quarantined(self, output: Any, requests: dict[str, Request]) -> dict[int, LoadFailure]:
        """Adapters whose numbers are not finite in a step's output; see `Quarantine.look`."""
        return self.observer.quarantined(self.quarantine.look(output, requests, self.version))

    def take_lost(self) -> dict[int, LoadFailure]:
        """Adapters that some worker was without in a step since the last call, and why.

        They have no slot from now on; their requests that have run are to be ended.
        """
        lost, self._lost = self._lost, {}
        for adapter_id in lost:
            self.slots.missing(adapter_id)
        return lost

    def drop(self, adapter_id: int) -> None:
        """No request uses the adapter any more."""
        if (adapter := self._known.find(adapter_id)) is not None:
            adapter.dropped()

    # What operators ask

    def pin(self, adapter_id: int) -> Future[bool]:
        """Loads an adapter if necessary and keeps it in its slot once it has one.

        It gets a slot now if one can be spared, else with its next request.

        Raises:
            ValueError: The adapter was never added.
            PinLimitError: All slots but one are pinned already.
        """
        adapter = self._known.find(adapter_id)
        if adapter is None:
            raise ValueError(
                f"LoRA adapter {adapter_id} cannot be pinned: it was never added. Add it first."
            )
        future = adapter.pinned()
        self._ask(adapter)
        return self._answered(adapter, future)

    def remove(self, adapter_id: int) -> Future[bool]:
        """Forgets an adapter that no request uses: if it was known, once its memory is free."""
        self.pushed.remove(adapter_id)
        adapter = self._known.find(adapter_id)
        if adapter is not None:
            return adapter.withdrawn()
        done: Future[bool] = Future()
        done.set_result(False)
        return done

    def blends_with(self, adapter_id: int) -> list[int]:
        return [adapter.number for adapter in self._known.blends_with(adapter_id)]

    def slots_lost(self) -> None:
        """The slots' memory did not survive (sleep mode): adapters are to be copied there again."""
        self.slots.clear_all()
        self.observer.settle(self.state, self.slots.contents)

    def yield_host_memory(self) -> None:
        """Gives back what waits there for a slot; the scheduler asks for it again."""
        self._known.release()

    def known(self) -> KnownAdapters:
        return self._known

    # The exchange with the store and the workers

    def poll(self, lease_s: float = 0.0) -> None:
        """Takes in what has happened since, and sends what is due; see `Exchange.hear`."""
        self._poll(lease_s)
        self._exchange.send(self._wait_s, self._poll)
        self.observer.settle(self.state, self.slots.contents)

    def _poll(self, lease_s: float = 0.0, copy_s: float = 0.0) -> None:
        answers = self._exchange.workers.poll(copy_s)
        self._exchange.hear(self._take, lease_s)
        # After what the store says: that it has gone explains why copies have failed.
        for rank, answer in answers:
            if isinstance(answer, Missing):
                self._lost[answer.adapter_id] = _NOT_IN_SLOT
            elif (under_way := self._exchange.answered(rank, answer)) is not None:
                under_way.adapter.order_answered(under_way, rank, answer)

    def _take(self, message: msg.ToUser) -> None:
        """Takes in what the store says."""
        match message:
            case msg.Loaded(ticket):
                if (load := self._exchange.end(ticket)) is not None:
                    load.adapter.store_loaded(load, message)
                elif message.leased:  # taken back by what came before this, in the same call
                    self._exchange.store.release(message.pack.pack)
            case msg.Reading(ticket):
                if (load := self._exchange.find(ticket)) is not None:
                    load.is_reading = True
            case msg.Failed(ticket):
                if (load := self._exchange.end(ticket)) is not None:
                    load.adapter.store_failed(load, message)
            case msg.Evicted(pack):
                self._known.evict(pack)
            case msg.Forgotten(number):
                self._exchange.forgotten(number)
            case msg.Totals():
                self.observer.totals(message)
            case msg.Restarted():
                self._known.lose_store()

    def _answered(self, adapter: AdapterMachine, future: Future[bool]) -> Future[bool]:
        """What waits for an adapter; done already where the answer is there."""
        # An idle engine core polls only when it is written to: nobody might look for it later.
        adapter.settle()
        self.poll()
        return future

    def _ask(self, adapter: AdapterMachine) -> None:
        """Requests an adapter from the store, unless it is there, in a slot, or requested."""
        if adapter.load is None and not adapter.is_at_hand:
            if self.asks_late:  # all wait for the store, and so what waits for slots makes room
                self.yield_host_memory()
            adapter.needed()


def _refused(request: LoRARequest, kind: FailureKind, message: str) -> Future[bool]:
    refused: Future[bool] = Future()
    failure = LoadFailure(kind, message)
    refused.set_exception(AdapterRefusedError(request.lora_int_id, failure, []))
    return refused


def _await_load(
    adapter: AdapterMachine,
    exchange: Exchange[AdapterMachine],
    wait_s: float,
    poll: Callable[[], None],
) -> None:
    """Waits until a load has ended; one that takes longer than a store allows it has failed."""
    until = time.monotonic() + wait_s
    while (load := adapter.load) is not None:
        if time.monotonic() > until:
            exchange.cancel(load)
            late = f"the store of adapters has not answered within {wait_s:g} s"
            adapter.store_failed(load, msg.Failed(load.ticket, FailureKind.TIMEOUT, late, []))
        poll()
        if adapter.load is not None:
            time.sleep(_IDLE_S)
