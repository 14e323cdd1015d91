"""The engine core's adapters: has the store load them, gives them slots, has workers fill these.

The store owns files and host memory and reports what it has; workers report when an order has been
carried out; slots are decided here. The scheduler asks in each step, and holds requests back until
their adapter is in its slot. Nothing blocks but for what is short: leases on what is in host memory
and copies of small adapters are waited for, a few milliseconds in a step.

```
 request_load ─► store: QUEUED, READING ─► Loaded, with a lease ─► bring ─► workers: Fill
                          └─► Failed                                          └─► Filled: lease back
```

What is known of an adapter is its `AdapterEntry`. `Registrations` holds the entries, `LoadRequests`
what the store was asked, and `OrdersUnderWay` what the workers were told; `Arrivals` handles the
answers of both.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.failures import LoadFailure
from vllm_multilora.integration.engine.adapters.adapter_entries import AdapterEntry, Entries
from vllm_multilora.integration.engine.adapters.arrivals import Arrivals
from vllm_multilora.integration.engine.adapters.load_requests import LoadRequests, Store
from vllm_multilora.integration.engine.adapters.orders_under_way import OrdersUnderWay, Workers
from vllm_multilora.integration.engine.adapters.pushed_folders import PushedFolders
from vllm_multilora.integration.engine.adapters.quarantine import Quarantine
from vllm_multilora.integration.engine.adapters.registrations import KnownBlends, Registrations
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.states import AdapterState
from vllm_multilora.store.protocol.messages import PackInfo

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
    from vllm_multilora.integration.seals import Seal
    from vllm_multilora.integration.worker.pushed_tensors import Push


class EngineAdapters:
    """An engine core's adapters; for its main thread only.

    Args:
        store: Loads adapters.
        workers: Fill slots.
        slots: Decides who has which.
        ranks: Number of workers.
        observer: Told of everything that is counted or shown.
        asks_late: Whether the store keeps everybody waiting, so that it is asked only for a
            request that is about to run.
        copy_s: Seconds that a step waits for copies of small adapters, from the first one on; 0
            where workers may still have a step when the next is scheduled.
        store_address: Tells stores apart.
        required: Which versions may be served; None: all.
        signing_keys: File of keys by one of which adapters must be signed; None: none need be.
        most_blends: Blends of each tenant that there may be at a time.

    Attributes:
        slots, observer, asks_late, store_address: As above.
        quarantine: Weights that must not be used.
        pushed: The folders of adapters that workers were given as tensors.
    """

    def __init__(
        self,
        store: Store,
        workers: Workers,
        slots: SlotAssignment,
        ranks: int,
        observer: AdapterObserver,
        *,
        asks_late: bool = False,
        copy_s: float = 0.0,
        store_address: str = "",
        required: RequiredDigests | None = None,
        signing_keys: str | None = None,
        most_blends: int = 0,
    ) -> None:
        self.slots = slots
        self.asks_late = asks_late
        self.store_address = store_address
        self.observer = observer
        self.quarantine = Quarantine()
        self.pushed = PushedFolders()
        loads = self._load_requests = LoadRequests(store, signing_keys)
        self._orders = OrdersUnderWay(workers, slots, ranks)
        self._registrations = Registrations(self._load_requests, self._orders, slots, observer)
        self._arrivals = Arrivals(
            self._registrations, loads, self._orders, slots, observer, copy_s, required
        )
        self._known = self._registrations.known
        self._blends = KnownBlends(self._registrations, most_blends)
        self._running: frozenset[int] = frozenset()

    # What the scheduler asks

    def request_load(self, request: LoRARequest, tenant: Seal | None = None) -> LoadFailure | None:
        """A request for an adapter has arrived; returns why it cannot be served, in any case."""
        request = self.pushed.resolve(request)
        owner = "" if tenant is None else tenant.tenant
        failure = self._registrations.clash(request) or self._blends.admit(request, owner)
        if failure is not None:
            return failure
        is_new = self._known.find(request.lora_int_id) is None
        entry = self._registrations.find(request)
        if is_new:
            entry.blend_owner = owner
        entry.is_requested = True
        if tenant is not None and tenant.tenant not in entry.owners:
            entry.owners[tenant.tenant] = tenant.resident
            self._load_requests.share(entry, tenant.tenant)
        entry.failure = None  # a new request is a new try
        if request.load_inplace:
            if not entry.is_reload_asked:
                self._load_requests.cancel(entry)  # it need not look at the files
            entry.is_reload_asked, entry.reload_failure = True, None
        if not self.asks_late:
            self._ask(entry)
        return None

    def state(self, adapter_id: int) -> AdapterState:
        entry = self._known.find(adapter_id)
        if entry is None:
            return AdapterState.ABSENT
        if self.quarantine.failure(entry.serving) is not None:
            return AdapterState.QUARANTINED
        return entry.state(self.slots)

    def is_reloading(self, adapter_id: int) -> bool:
        """Whether the store has been asked for an adapter's reload, and has not answered."""
        entry = self._known.find(adapter_id)
        return entry is not None and entry.is_reload_asked and entry.ticket is not None

    def version(self, adapter_id: int) -> PackInfo | None:
        """The newest version of an adapter's weights, None before it was loaded; any thread."""
        entry = self._known.find(adapter_id)
        return None if entry is None else entry.pack

    def begin_step(self, active: frozenset[int]) -> None:
        self._arrivals.begin_step(active)

    def is_ready(self, adapter_id: int, *, reload: bool = False) -> bool:
        """Whether an adapter that requests wait for can be brought into a slot now, or is in one.

        Asks for one that has been lost meanwhile.
        """
        if self.failure(adapter_id, reload=reload) is not None:
            return False
        entry = self._known[adapter_id]
        self._ask(entry)
        if self.asks_late and entry.ticket is not None:  # the answer is there already
            self.poll()
        return self.failure(adapter_id, reload=reload) is None and entry.is_at_hand(self.slots)

    def is_at_hand(self, adapter_id: int) -> bool:
        """Whether an adapter would use a slot now, as far as is known without asking for it."""
        entry = self._known.find(adapter_id)
        return self.asks_late or (entry is not None and entry.is_at_hand(self.slots))

    def bring(self, adapter_id: int) -> bool:
        """Whether an adapter that is ready is in its slot; has it copied into one if not.

        A small adapter's copy is waited for, if the step has time. Where no slot can be spared
        nothing happens: ask again in the next step.
        """
        return self._arrivals.bring(self._known[adapter_id])

    def running(self, adapters: frozenset[int], *, computes: bool = True) -> None:
        """Tells the adapters of all running requests; once a step, when it has been scheduled."""
        if adapters != self._running:
            found = [e for i in sorted(adapters) if (e := self._known.find(i)) is not None]
            self._load_requests.used(
                [e.pack.pack for e in found if e.pack is not None and e.in_host]
            )
            self._running = adapters
        self.slots.running(adapters)
        if computes:
            self.observer.step(adapters)
        self._orders.send()

    def failure(self, adapter_id: int, *, reload: bool = False) -> LoadFailure | None:
        """Why an adapter cannot be had, None unless its state is FAILED or QUARANTINED.

        A reload that fails leaves the version before serving those that did not ask for it.
        """
        entry = self._known.find(adapter_id)
        if entry is None:
            return None
        failure = self.quarantine.failure(entry.serving) or entry.failure
        return failure or (entry.reload_failure if reload else None)

    def take_quarantined(self, output: Any, requests: dict[str, Request]) -> dict[int, LoadFailure]:
        """Adapters whose numbers are not finite in a step's output; see `Quarantine.look`."""
        return self.observer.quarantined(self.quarantine.look(output, requests, self.version))

    def take_lost(self) -> dict[int, LoadFailure]:
        """Adapters that some worker was without in a step since the last call, and why.

        They have no slot from now on; their requests that have run are to be ended.
        """
        lost, self._arrivals.lost = self._arrivals.lost, {}
        for adapter_id in lost:
            self.slots.missing(adapter_id)
        return lost

    def drop(self, adapter_id: int) -> None:
        """No request uses the adapter any more."""
        entry = self._known.find(adapter_id)
        if entry is None:
            return
        entry.is_requested = False
        entry.owners.clear()
        if not entry.registrations:
            self._load_requests.cancel(entry)
        self._load_requests.release(entry)

    # What operators ask

    def pin(self, adapter_id: int) -> Future[bool]:
        """Loads an adapter if necessary and keeps it in its slot once it has one.

        It gets a slot now if one can be spared, else with its next request.

        Raises:
            ValueError: The adapter was never added.
            PinLimitError: All slots but one are pinned already.
        """
        entry = self._known.find(adapter_id)
        if entry is None:
            raise ValueError(
                f"LoRA adapter {adapter_id} cannot be pinned: it was never added. Add it first."
            )
        future = self._registrations.pin(entry)
        self._ask(entry)
        return self._answered(entry, future)

    def register(self, request: LoRARequest) -> Future[bool]:
        """Has an adapter read and checked; holds an `AdapterRefusedError` if it cannot be served.

        That lifts its weights' quarantine, unless it is known or a request's, of a directory.
        """
        request = self.pushed.resolve(request)
        known = self._known.find(request.lora_int_id)
        failure = self._registrations.clash(request) or self._blends.admit(request, "")
        if failure is not None:
            return _done(error=AdapterRefusedError(request.lora_int_id, failure, []))
        entry = self._registrations.find(request)
        # A directory's number stands for one version of its files; others may have been read since.
        fresh = request.load_inplace or (entry.number >= FIRST_NUMBER and entry.pack is not None)
        future = self._registrations.register(entry, fresh=fresh)
        if request.load_inplace or (entry is not known and entry.number < FIRST_NUMBER):  # anew
            future.add_done_callback(
                lambda done: self.quarantine.lift(None if done.exception() else entry.serving)
            )
        return self._answered(entry, future)

    def push(self, push: Push) -> Future[bool]:
        """Registers what workers were given as tensors, in the place of the version before."""
        self.pushed.begin(push)
        request = LoRARequest(push.name, push.number, push.path, load_inplace=True)
        future = self.register(request)
        future.add_done_callback(
            lambda done: self.pushed.end(push, is_accepted=done.exception() is None)
        )
        return future

    def remove(self, adapter_id: int) -> Future[bool]:
        """Forgets an adapter that no request uses: if it was known, once its memory is free."""
        self.pushed.remove(adapter_id)
        entry = self._known.find(adapter_id)
        if entry is None:
            return _done()
        return self._registrations.withdraw(entry)

    def blends_with(self, adapter_id: int) -> list[int]:
        return [entry.number for entry in self._known.blends_with(adapter_id)]

    def slots_lost(self) -> None:
        """The slots' memory did not survive (sleep mode): adapters are to be copied there again."""
        self.slots.clear_all()
        self.observer.settle(self.state, self.slots.contents)

    def yield_host_memory(self) -> None:
        """Gives back what waits there for a slot; the scheduler asks for it again."""
        for entry in list(self._known.leased):
            self._load_requests.release(entry)

    def known(self) -> Entries:
        return self._known

    # The exchange with the store and the workers

    def poll(self, lease_s: float = 0.0) -> None:
        """Takes in what has happened since, and sends what is due; see `LoadRequests.hear`."""
        self._arrivals.poll(lease_s)
        self._orders.send()
        self.observer.settle(self.state, self.slots.contents)

    def _answered(self, entry: AdapterEntry, future: Future[bool]) -> Future[bool]:
        """What waits for an adapter; done already where the answer is there."""
        # An idle engine core polls only when it is written to: nobody might look for it later.
        self._arrivals.settle(entry)
        self.poll()
        return future

    def _ask(self, entry: AdapterEntry) -> None:
        """Requests an adapter from the store, unless it is there, in a slot, or requested."""
        if entry.ticket is None and not entry.is_at_hand(self.slots):
            if self.asks_late:  # all wait for the store, and so what waits for slots makes room
                self.yield_host_memory()
            self._load_requests.release(entry)  # of a stale version; the new one may need its room
            self._load_requests.ask(entry)


def _done(*, error: Exception | None = None) -> Future[bool]:
    """What has failed, or has had nothing to do."""
    future: Future[bool] = Future()
    if error is None:
        future.set_result(False)
    else:
        future.set_exception(error)
    return future
