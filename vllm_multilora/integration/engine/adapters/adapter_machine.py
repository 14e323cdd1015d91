"""One adapter as a state machine: what happens to it goes in, its state and orders come out.

Events are methods. They come from requests and operators, from the store and from the workers, and
nothing else changes an adapter. Orders go to the store and the workers by `Exchange`; where the
adapter gets a slot is asked of `SlotAssignment`. All of it is decided here, for one adapter at a
time, but that a blend is made anew when one of its parts has other weights.

| what an adapter has | from | to |
|---|---|---|
| `load` for requests | asked for, not at hand | loaded, failed, cancelled with the last request |
| `check` for registrations: a load, then workers' | registered, not there | checked, failed |
| `pack` in host memory, with or without a lease | loaded or checked | evicted, store lost |
| a slot, at `SlotAssignment` | brought, with the lease | displaced, withdrawn, order failed |
| `failure` | load, check or order failed | asked for again |
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.files.regular_file import Fingerprint
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.failures import FailureKind, LoadFailure
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.integration.engine.adapters.exchange import Exchange, PendingLoad, UnderWay
from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Fill
from vllm_multilora.slots.assignment import Assignment, SlotAssignment
from vllm_multilora.slots.events import Tier
from vllm_multilora.states import AT_HAND, AdapterState
from vllm_multilora.store.protocol.messages import Failed, Loaded, LoadRequest, PackInfo

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.seals import Seal

logger = logging.getLogger(__name__)

MAX_TIMES_GONE = 8
"""Loads in a row of an adapter that a worker cannot fetch although its store seems to be alive. The
engine core soon learns that a store has died, so this number is only reached otherwise."""

BLENDS = "\0blends"
"""The owner of loads of blends that no tenant asks for: in the store's queue they share a turn."""

_OUT_OF_REACH = (
    "a worker of the server cannot have what its store of adapters has loaded; the server's log "
    "says why"
)

ACTIVATED = "activated adapters (aLoRA) act from where a request's first version says: no `swap`"


@dataclass(eq=False)
class Surroundings:
    """What the adapters of an engine core have in common.

    Attributes:
        exchange: Has their orders.
        slots: Decides who has which.
        observer: Told of everything that is counted or shown.
        required: Which versions may be served; None: all.
        forget: Takes one out of those that are known.
        leased: Those whose newest version stays in host memory until it is given back.
        by_pack: Those whose newest version is a pack in host memory, by its number.
        by_part: Blends, by the numbers of their parts.
        swapping: Those whose running requests are to go on with the newest version.
    """

    exchange: Exchange[AdapterMachine]
    slots: SlotAssignment
    observer: AdapterObserver
    required: RequiredDigests | None
    forget: Callable[[AdapterMachine], None]
    leased: dict[AdapterFacts, None] = field(default_factory=dict)
    by_pack: dict[int, dict[AdapterFacts, None]] = field(default_factory=dict)
    by_part: dict[int, dict[AdapterMachine, None]] = field(default_factory=dict)
    swapping: dict[AdapterMachine, None] = field(default_factory=dict)


class AdapterFacts:
    """What an engine core knows of one adapter, and how it gives up what it has.

    Attributes:
        request: The newest request's adapter: number, name and path.
        is_read_on_request: Whether its registration has a request behind it.
        blend: What it is blended of; None if it is no blend.
        blend_owner: The tenant that a blend counts among the blends of; empty: nobody's.
        load: The outstanding load request of requests; None if there is none.
        check: That of registrations or, after it, the order by which workers check what it found.
        pack: The newest version of its weights; None before it was loaded.
        loaded: When that version was first had, in seconds since 1970.
        in_host: Whether that version is in host memory.
        is_requested: Whether requests wait for it.
        owners: Tenants whose requests do, each with its limit of adapters in host memory.
        failure: Why the last load failed; until the next one.
        reload_failure: Why the last reload that requests asked for failed, with the version before
            to go on with; until the next one.
        is_reload_asked: Whether a request has asked for its files to be looked at again.
        registrations: Answered when it has been checked.
        is_in_flight: Whether running requests go on with every new version.
        updates: How many other versions it has had before this one.
    """

    def __init__(self, request: LoRARequest, around: Surroundings, *, on_request: bool) -> None:
        self.request = request
        self.is_read_on_request = on_request
        self.blend, self.blend_owner = blend_of(request), ""
        self.load: PendingLoad[AdapterMachine] | None = None
        self.check: PendingLoad[AdapterMachine] | UnderWay[AdapterMachine] | None = None
        self.pack: PackInfo | None = None
        self.loaded: float | None = None
        self.in_host = self.is_requested = self.is_reload_asked = False
        self.owners: dict[str, int | None] = {}
        self.failure: LoadFailure | None = None
        self.reload_failure: LoadFailure | None = None
        self.registrations: list[Future[bool]] = []
        self.is_in_flight = False
        self.updates = -1  # before the first version
        self._around, self._exchange, self._slots = around, around.exchange, around.slots
        # Answered by the next check: the one that was under way when they came may have opened the
        # files before these were written again.
        self._later: list[Future[bool]] = []
        # A newer version is to serve: one that was checked, and found no room, or a blend of what
        # its parts are now.
        self._is_outdated = False
        # How often in a row a worker has not had the pack's memory, with the same store.
        self._times_gone = 0
        # State of the file of signing keys when the store was asked for what it has.
        self._checked_under: Fingerprint | None = None

    @property
    def number(self) -> int:
        return self.request.lora_int_id

    @property
    def is_leased(self) -> bool:
        """Whether its newest version stays in host memory until it is given back."""
        return self in self._around.leased

    @property
    def is_stale(self) -> bool:
        """Whether its files are to be looked at again before it serves new requests."""
        return self._is_outdated or self.is_reload_asked

    @property
    def serving(self) -> PackInfo | None:
        """The version for new requests; None where that is one still to be had."""
        return None if self.is_stale else self.pack

    @property
    def state(self) -> AdapterState:
        """Where the adapter is."""
        if self.failure is not None:
            return AdapterState.FAILED
        if (pack := self.serving) is not None:
            if self._slots.is_filled(self.number, pack.pack):
                return AdapterState.SLOT
            if self.in_host:
                return AdapterState.HOST
        under_way = [each for each in (self.load, self.check) if each is not None]
        if any(isinstance(each, UnderWay) or each.is_reading for each in under_way):
            return AdapterState.READING
        return AdapterState.QUEUED if under_way else AdapterState.ABSENT

    @property
    def is_at_hand(self) -> bool:
        """Whether the version to serve is on lease, or in its slot or on its way there."""
        pack = self.serving
        return pack is not None and (
            self.is_leased or self._slots.pack_in(self.number) == pack.pack
        )

    @property
    def is_idle(self) -> bool:
        """Whether nothing of the adapter is anywhere, and nobody waits for it."""
        return (
            self.state in (AdapterState.ABSENT, AdapterState.FAILED)
            and self.load is None
            and self.check is None
            and not (self.is_requested or self.registrations)
            and self.number not in self._slots.pins
            and self._slots.slot_of(self.number) is None
        )

    def _is_in_slot(self, digest: str) -> bool:
        """Whether weights are in the adapter's slot, from whichever pack they came."""
        if (pack := self.pack) is None or pack.digest != digest:
            return False
        return self._slots.is_filled(self.number, pack.pack)

    # Without orders for others

    def requested(self, tenant: Seal | None, *, reload: bool) -> None:
        """A request has come."""
        self.is_requested = True
        if tenant is not None and tenant.tenant not in self.owners:
            self.owners[tenant.tenant] = tenant.resident
            if self.load is not None:  # its turn is as good
                self._exchange.store.share(self.load.ticket, tenant.tenant)
        self.failure = None  # a new request is a new try
        if reload:
            if not self.is_reload_asked:
                self._cancel_load()  # it need not look at the files
            self.is_reload_asked, self.reload_failure = True, None

    def pinned(self) -> Future[bool]:
        """Keeps it in its slot once it has one; done when it can be served.

        It counts among the pinned ones at once, so that no more calls than can be kept succeed. If
        it cannot be had, it is pinned no more, unless it was before.

        Raises:
            PinLimitError: All slots but one are pinned already.
        """
        pins, observer = self._slots.pins, self._around.observer

        def unpin_what_failed(done: Future[bool]) -> None:
            if done.exception() is not None:
                pins.unpin(self.number)
                observer.pinned(pins.adapters)

        future: Future[bool] = Future()
        if self.number not in pins:
            pins.pin(self.number)
            observer.pinned(pins.adapters)
            future.add_done_callback(unpin_what_failed)
        self.failure = None
        self.registrations.append(future)
        return future

    def release(self) -> None:
        """Gives its lease back, if it has one."""
        if self.is_leased and self.pack is not None:
            self._around.leased.pop(self)
            self._exchange.store.release(self.pack.pack)

    def evicted(self) -> None:
        """Its newest version has left host memory."""
        self.in_host = False
        self._around.leased.pop(self, None)
        self._around.observer.evicted(Tier.CPU, self.number)

    def _note_pack(self, pack: PackInfo) -> None:
        """The newest version is this one; pack 0 is in nobody's memory."""
        self.leave_pack()
        if self.pack is None or self.pack.digest != pack.digest:
            self.loaded = time.time()
            self.updates += 1
        self.pack, self.in_host, self._is_outdated = pack, pack.pack != 0, False
        if self.in_host:
            self._around.by_pack.setdefault(pack.pack, {})[self] = None

    def leave_pack(self) -> None:
        """Takes it from those that a pack in host memory is of."""
        number = 0 if self.pack is None else self.pack.pack
        if (known := self._around.by_pack.get(number)) is not None:
            known.pop(self, None)
            if not known:
                del self._around.by_pack[number]

    def _refusal(self, pack: PackInfo) -> tuple[LoadFailure, list[dict[str, Any]]] | None:
        """Why a version must not be served, and the problem; None if it may."""
        if self.is_in_flight and pack.invocation_tokens:
            return LoadFailure(FailureKind.INVALID, ACTIVATED), []
        required = self._around.required
        if required is None:
            return None
        digests = [(self.request.lora_name, pack.digest)]
        if self.blend is not None:
            names = (part.name for part in self.blend.parts)
            digests = list(zip(names, pack.parts, strict=True))
        for problem in filter(None, (required.refuse(*each) for each in digests)):
            return LoadFailure(FailureKind.INVALID, str(problem)), [problem.as_dict()]
        return None

    def store_lost(self) -> None:
        """The store has gone, and host memory with it; the next one is asked by load requests."""
        self.in_host, self._times_gone = False, 0
        self._around.leased.pop(self, None)
        for each in (self.load, self.check):
            if isinstance(each, PendingLoad):
                each.is_reading = False

    def _cancel_load(self) -> None:
        if self.load is not None:
            self._exchange.cancel(self.load)
            self.load = None

    def _cancel_check(self) -> None:
        if isinstance(self.check, PendingLoad):
            self._exchange.cancel(self.check)
        self.check = None

    def _end(self, load: PendingLoad[AdapterMachine]) -> bool:
        """A load request was answered; whether it was that of registrations."""
        is_check = load is self.check
        if is_check:
            self.check = None
        else:
            self.load = None
        return is_check

    def _order_failure(
        self, under_way: UnderWay[AdapterMachine], rank: int, answer: FillFailed
    ) -> LoadFailure | None:
        """Why an order has failed; None where its pack has gone: the adapter is loaded again.

        That helps if the pack has gone with its store. It does not if the worker cannot reach the
        store, which has the pack: it has no descriptor left, or somebody has removed the socket.
        """
        if under_way.is_lost:
            return None
        if not answer.is_gone:
            return LoadFailure(answer.kind, answer.message)
        self._times_gone += 1
        if self._times_gone <= MAX_TIMES_GONE:
            return None
        logger.error(
            "Adapter %r: worker %d could not have it from the store: %s",
            *(self.request.lora_name, rank, answer.message),
        )
        return LoadFailure(answer.kind, _OUT_OF_REACH)

    def _has(self, part: AdapterFacts, digest: str) -> bool:
        """Whether these weights of a part are in this blend, or will be."""
        if self.blend is None or self.pack is None:
            return part.pack is None  # both are being loaded for the first time
        numbers = (each.number for each in self.blend.parts)
        return (part.number, digest) in zip(numbers, self.pack.parts, strict=True)


class AdapterMachine(AdapterFacts):
    """What follows from what happens to one adapter."""

    # Events: requests

    def needed(self) -> None:
        """A request, or a pin, needs it at hand."""
        if self.load is None and not self.is_at_hand:
            self.release()  # of a stale version; the new one may need its room
            self.load = self._request(keep=True, fresh=self.is_stale)

    def bring(self) -> bool:
        """Whether an adapter that is at hand is in its slot; has it copied into one if not.

        Where no slot can be spared nothing happens.
        """
        pack = self.pack
        assert pack is not None
        if self._slots.admit(self.number, pack.pack):
            return True
        assignment = self._slots.assign(self.number, pack.pack)
        if assignment is not None:
            self._order_fill(assignment)
        return False

    def _order_fill(self, assignment: Assignment, *, is_beside: bool = False) -> None:
        assert self.pack is not None
        self._around.leased.pop(self)  # the lease is the order's now
        order, slot = assignment.order, assignment.slot
        fill = Fill(order, self.request, self.pack, slot=slot, is_beside=is_beside)
        self._exchange.order(self, fill)

    def dropped(self) -> None:
        """No request uses it any more."""
        self.is_requested = False
        self.owners.clear()
        if not self.registrations:
            self._cancel_load()
        self.release()

    # Events: operators

    def registered(self, *, fresh: bool) -> Future[bool]:
        """Has it checked, unless it is there; `fresh`: even then.

        One check is under way at a time, and all `fresh` ones that come meanwhile get the next.
        """
        future: Future[bool] = Future()
        self.failure = None
        if fresh and self.check is not None:
            self._later.append(future)
            return future
        self.registrations.append(future)
        if self.check is None and (fresh or self.state not in AT_HAND):
            self._begin_check(fresh=fresh)
        return future

    def withdrawn(self) -> Future[bool]:
        """Forgets it, here and in the store; done when nothing of it is left there."""
        self._cancel_load()
        self._cancel_check()
        self.release()
        gone = self._exchange.forget(self.number)
        self._around.forget(self)
        self.registrations, self._later = [*self.registrations, *self._later], []
        self._refuse(LoadFailure(FailureKind.GONE, "it was removed meanwhile"), [])
        return gone

    def swap(self) -> bool:
        """Brings the newest version into a slot beside that of running requests.

        Returns:
            Whether it is there, and they go on with it from the next step on.
        """
        pack, slots, number = self.pack, self._slots, self.number
        assert pack is not None
        slot = slots.succeed(number, pack.pack)
        if slot is not None:
            self._exchange.swap(self.request, pack, slot)
        has_slot = slots.slot_of(number) is not None and not slots.is_filled(number, pack.pack)
        if not has_slot or not self.is_requested:
            slots.give_up_successor(number)
            del self._around.swapping[self]
            self.settle()
        elif slots.pack_in(number) != pack.pack:
            slots.give_up_successor(number)  # an older one
            if not self.is_leased:
                self.needed()
            elif (assignment := slots.assign_beside(number, pack.pack)) is not None:
                self._order_fill(assignment, is_beside=True)
        return slot is not None

    def settle(self) -> None:
        """Answers those who wait for it to be there, if it is."""
        is_there = self.failure is None and self.pack is not None
        is_pending = self.check is not None or self.load is not None
        if not is_there or is_pending or self in self._around.swapping:
            return
        registrations = self._take_registrations()
        for future in registrations:
            future.set_result(True)
        if registrations and self.number in self._slots.pins and self.is_leased:
            self.bring()
        if not self.is_requested:
            self.release()
        self._around.observer.arrived(self.number)

    # Events: the store

    def store_loaded(self, load: PendingLoad[AdapterMachine], message: Loaded) -> None:
        """What was asked for is in host memory or, without room there, was checked."""
        is_check, pack = self._end(load), message.pack
        self._checked_under, self.failure = load.keys, None
        self._around.observer.loaded(self.request, message)
        if message.was_read and not is_check:
            self._slots.read_on_demand(self.number)
        if (refusal := self._refusal(pack)) is not None:
            if message.leased:
                self._exchange.store.release(pack.pack)
            self._load_failed(*refusal, is_check=is_check)
        elif is_check and pack.has_special and pack.pack and not self._is_in_slot(pack.digest):
            # Workers check what vLLM fills in itself; until then the version before serves. One
            # that found no room is not checked further: its shapes were, by the store.
            if message.leased:
                self.check = self._exchange.check(self, self.request, pack)
            else:
                self._begin_check(fresh=False, keep=True)
        else:
            self._take_pack(pack, has_lease=message.leased, is_check=is_check)
            self.settle()

    def store_failed(self, load: PendingLoad[AdapterMachine], message: Failed) -> None:
        """What was asked for cannot be had."""
        failure = LoadFailure(message.kind, message.message)
        self._load_failed(failure, message.problems, is_check=self._end(load))

    # Events: the workers

    def order_answered(
        self, under_way: UnderWay[AdapterMachine], rank: int, answer: Filled | FillFailed
    ) -> None:
        """A worker has carried out an order, or could not."""
        if isinstance(under_way.order, Fill):
            self._take_fill(under_way, rank, answer)
        elif under_way is self.check:
            self._take_check(under_way, rank, answer)
        if not under_way.unanswered and under_way.is_leased:
            self._exchange.store.release(under_way.order.pack.pack)

    def _take_fill(
        self, under_way: UnderWay[AdapterMachine], rank: int, answer: Filled | FillFailed
    ) -> None:
        if isinstance(answer, Filled):
            if rank == 0 and answer.seconds is not None:
                self._around.observer.copied(self.request, answer.seconds)
            if self._slots.filled(answer.order, rank):
                self._times_gone = 0
                self.settle()
        elif self._slots.fill_failed(answer.order) is not None:
            if (failure := self._order_failure(under_way, rank, answer)) is not None:
                self._fail(failure, [])
            elif self.pack is under_way.order.pack:
                self.in_host = False  # its requests ask for it again

    def _take_check(
        self, under_way: UnderWay[AdapterMachine], rank: int, answer: Filled | FillFailed
    ) -> None:
        if isinstance(answer, Filled) and under_way.unanswered:
            return
        self.check = None
        if isinstance(answer, FillFailed):
            if (failure := self._order_failure(under_way, rank, answer)) is not None:
                self._fail(failure, [])
            else:
                self._begin_check(fresh=False)
        elif under_way.is_lost:
            self._begin_check(fresh=False)
        else:
            self._times_gone = 0
            under_way.is_leased = False  # it is the adapter's now
            self._take_pack(under_way.order.pack, has_lease=True, is_check=True)
            self.settle()

    # Load requests

    def _request(self, *, keep: bool, fresh: bool) -> PendingLoad[AdapterMachine]:
        asked = LoadRequest(
            self.number,
            self.request.lora_name,
            self.request.lora_path,
            owners=tuple(self.owners) or (() if self.blend is None else (BLENDS,)),
            most=next(iter(self.owners.values()), None),
            keep=keep,
            fresh=fresh,
        )
        return self._exchange.load(
            self, asked, in_host=self.in_host, checked_under=self._checked_under
        )

    def _begin_check(self, *, fresh: bool, keep: bool = False) -> None:
        """Requests it for registrations; what is under way for them counts no more.

        Others leave memory for it if `keep`, or if a request will want it as soon as it is
        registered: it would be read twice.
        """
        self._cancel_check()
        is_used = self.is_read_on_request or (self.is_in_flight and self.is_requested)
        self.check = self._request(keep=keep or is_used, fresh=fresh)

    # What was loaded

    def _take_pack(self, pack: PackInfo, *, has_lease: bool, is_check: bool) -> None:
        """Notes the newest version, as it lies in host memory or was only checked."""
        known = self.pack
        if not (is_check and self.is_requested):
            # A check may have looked at the files before requests asked, which have a load of their
            # own.
            self.is_reload_asked = False
        if known is None or known.digest != pack.digest:
            for blend in list(self._around.by_part.get(self.number, ())):
                blend.part_changed(self, pack.digest)
        if self._is_in_slot(pack.digest):
            # These weights are in the slot already, from whichever copy they came.
            self._is_outdated = False
            if has_lease:
                self._exchange.store.release(pack.pack)
        elif pack.pack == 0 and known is not None:
            self._is_outdated = known.digest != pack.digest
        else:
            if has_lease or known is None or known.pack != pack.pack:
                self.release()
            self._note_pack(pack)
            if has_lease:
                self._around.leased[self] = None
            if self.is_in_flight and self.is_requested and known is not None:
                self._around.swapping[self] = None

    def part_changed(self, part: AdapterMachine, digest: str) -> None:
        """A part of this blend has other weights: the next requests' blend is of these."""
        if self._has(part, digest):
            return
        self._is_outdated = True
        # What is under way may have read the part before.
        if self.load is not None:
            self._cancel_load()
            self.load = self._request(keep=True, fresh=True)
        if self.check is not None:
            self._begin_check(fresh=True)

    # Failures

    def _load_failed(
        self, failure: LoadFailure, problems: list[dict[str, Any]], *, is_check: bool
    ) -> None:
        """What a load request has brought cannot be served."""
        if is_check or self.pack is None or self._is_outdated or not self.is_reload_asked:
            self._fail(failure, problems)
        else:
            # Only those that asked for the reload fail; the version before serves the others.
            self.is_reload_asked, self.reload_failure = False, failure
            self._around.observer.failed(self.request, failure)
            self.settle()

    def _fail(self, failure: LoadFailure, problems: list[dict[str, Any]]) -> None:
        """It has failed and so have its registrations, and the version before serves on.

        One that was never served is not known any more.
        """
        self.failure = failure
        self._around.observer.failed(self.request, failure)
        self._around.swapping.pop(self, None)
        if not self.is_requested:
            self.release()
        # Registrations get the answer of a check that is under way.
        if self.check is not None or not self._refuse(failure, problems):
            return
        if self.pack is not None or self.check is not None:
            self.failure = None
        elif not self.is_requested:
            self.withdrawn()

    def _refuse(self, failure: LoadFailure, problems: list[dict[str, Any]]) -> bool:
        """Whether there were registrations to refuse."""
        registrations = self._take_registrations()
        error = AdapterRefusedError(self.number, failure, problems)
        for future in registrations:
            future.set_exception(error)
        return bool(registrations)

    def _take_registrations(self) -> list[Future[bool]]:
        """Takes what a finished check answers, and starts a check for later registrations."""
        registrations, self.registrations, self._later = self.registrations, self._later, []
        if self.registrations:
            self._begin_check(fresh=True)
        return registrations
