"""Handles what the store and the workers report about an engine core's adapters."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.failures import FailureKind, LoadFailure
from vllm_multilora.integration.engine.adapters.adapter_entries import AdapterEntry
from vllm_multilora.integration.engine.adapters.load_requests import LoadRequests
from vllm_multilora.integration.engine.adapters.orders_under_way import OrdersUnderWay, UnderWay
from vllm_multilora.integration.engine.adapters.registrations import Registrations
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed, Missing
from vllm_multilora.integration.worker_link.orders import Fill
from vllm_multilora.slots.assignment import AWAITED_BYTES, SlotAssignment
from vllm_multilora.store.protocol.messages import (
    Evicted,
    Failed,
    Forgotten,
    Loaded,
    PackInfo,
    Reading,
    Restarted,
    Totals,
    ToUser,
)

if TYPE_CHECKING:
    from vllm_multilora.integration.engine.adapters.observer import AdapterObserver

logger = logging.getLogger(__name__)

MAX_TIMES_GONE = 8
"""Loads in a row of an adapter that a worker cannot fetch although its store seems to be alive. The
engine core soon learns that a store has died, so this number is only reached otherwise."""

_OUT_OF_REACH = (
    "a worker of the server cannot have what its store of adapters has loaded; the server's log "
    "says why"
)


class Arrivals:
    """Takes in versions of adapters as they are loaded, copied, refused and lost.

    Attributes:
        lost: Adapters that some worker was without in a step, and that as their failure.
    """

    def __init__(
        self,
        registrations: Registrations,
        load_requests: LoadRequests,
        orders: OrdersUnderWay,
        slots: SlotAssignment,
        observer: AdapterObserver,
        copy_s: float,
        required: RequiredDigests | None,
    ) -> None:
        self._registrations = registrations
        self._load_requests = load_requests
        self._orders = orders
        self._slots = slots
        self._observer = observer
        self._required = required
        self._copy_s = copy_s
        self._copies_until: float | None = None  # in this step; None: nothing is copied yet
        self.lost: dict[int, LoadFailure] = {}

    def begin_step(self, active: frozenset[int]) -> None:
        """A step is being scheduled, when these adapters have running requests."""
        self._copies_until = None
        if self._copy_s:  # else a step under way may have requests that have ended since
            self._slots.begin_step(active)

    def poll(self, lease_s: float = 0.0, copy_s: float = 0.0) -> None:
        """Takes in what the store and the workers have said."""
        answers = self._orders.poll(copy_s)
        self._load_requests.hear(self._take, lease_s)
        # After what the store says: that it has gone explains why copies have failed.
        for rank, answer in answers:
            if isinstance(answer, Missing):
                self.lost[answer.adapter_id] = LoadFailure(
                    FailureKind.INTERNAL,
                    "its weights were not in their slot when a step needed them",
                )
            else:
                self._take_answer(rank, answer)

    def bring(self, entry: AdapterEntry) -> bool:
        """Whether an adapter that is at hand is in its slot, as of `EngineAdapters.bring`."""
        before = self._slots.pack_in(entry.number)
        if self._orders.bring(entry):
            return True
        pack = entry.pack
        assert pack is not None
        if self._slots.pack_in(entry.number) == before or pack.nbytes > AWAITED_BYTES:
            return False
        if self._copies_until is None:
            self._copies_until = time.monotonic() + self._copy_s
        while (
            self._slots.is_awaited(entry.number)
            and (left := self._copies_until - time.monotonic()) > 0
        ):
            self._orders.send()
            self.poll(copy_s=left)
        return entry.pack is pack and self._slots.admit(entry.number, pack.pack)

    def _take(self, message: ToUser) -> None:
        if isinstance(message, Loaded):
            self._take_loaded(message)
        elif isinstance(message, Reading):
            if (waiting := self._load_requests.find(message.ticket)) is not None:
                waiting.is_reading = True
        elif isinstance(message, Failed):
            self._take_failed(message)
        elif isinstance(message, Evicted):
            for entry in self._registrations.known.lose_pack(message.pack):
                self._observer.evicted_from_host(entry.request)
        elif isinstance(message, Forgotten):
            self._load_requests.forgotten(message.adapter)
        elif isinstance(message, Totals):
            self._observer.totals(message)
        elif isinstance(message, Restarted):
            self._start_over()

    def _take_answer(self, rank: int, answer: Filled | FillFailed) -> None:
        under_way = self._orders.answered(rank, answer)
        if under_way is None:  # an order that nobody knows is no matter
            return
        if isinstance(under_way.order, Fill):
            self._take_fill(rank, answer, under_way)
        elif answer.order == under_way.entry.check_order:
            self._take_check(rank, answer, under_way)
        if not under_way.unanswered and under_way.is_leased:
            self._load_requests.release_pack(under_way.order.pack.pack)

    def settle(self, entry: AdapterEntry) -> None:
        """Answers those who wait for an adapter to be there, if it is."""
        if entry.is_being_checked:
            return
        if entry.failure is not None or entry.pack is None or entry.ticket is not None:
            return
        self._registrations.succeed(entry)
        if not entry.is_requested:
            self._load_requests.release(entry)
        self._observer.arrived(entry.number)

    def _start_over(self) -> None:
        """A store is a new one: it holds nothing.

        Leases are given back all the same: with workers on several machines, the other machines'
        stores still hold their part, and a new store does not mind.
        """
        for entry in list(self._registrations.known.leased):
            self._load_requests.release(entry)
        self._registrations.known.lose_all_packs()
        self._orders.store_lost()
        self._load_requests.store_lost()

    def _take_loaded(self, message: Loaded) -> None:
        entry = self._load_requests.find(message.ticket)
        if entry is None:  # taken back by what came before this, in the same call
            if message.leased:
                self._load_requests.release_pack(message.pack.pack)
            return
        is_check = message.ticket == entry.check_ticket
        entry.checked_under = self._load_requests.end(entry, message.ticket)
        entry.failure = None
        self._observer.loaded(entry.request, message)
        if message.was_read and not is_check:
            self._slots.read_on_demand(entry.number)
        if (refusal := self._refusal(entry, message.pack)) is not None:
            if message.leased:
                self._load_requests.release_pack(message.pack.pack)
            self._refuse(entry, refusal, [], is_check=is_check)
            return
        if is_check and self._registrations.ask_workers(entry, message):
            return
        self._take_pack(entry, message.pack, has_lease=message.leased, is_check=is_check)
        self.settle(entry)

    def _take_pack(
        self, entry: AdapterEntry, pack: PackInfo, *, has_lease: bool, is_check: bool
    ) -> None:
        """Notes the newest version of an adapter, as it lies in host memory or was only checked."""
        known = entry.pack
        if not (is_check and entry.is_requested):
            # A check may have looked at the files before requests asked, which have a load of their
            # own.
            entry.is_reload_asked = False
        if known is None or known.digest != pack.digest:
            self._outdate_blends(entry, pack.digest)
        if entry.is_in_slot(self._slots, pack.digest):
            # These weights are in the slot already, from whichever copy they came.
            entry.is_outdated = False
            if has_lease:
                self._load_requests.release_pack(pack.pack)
        elif pack.pack == 0 and known is not None:
            entry.is_outdated = known.digest != pack.digest
        else:
            if has_lease or known is None or known.pack != pack.pack:
                self._load_requests.release(entry)
            self._registrations.known.note_pack(entry, pack)
            entry.is_leased |= has_lease
            entry.is_outdated = False

    def _outdate_blends(self, part: AdapterEntry, digest: str) -> None:
        """An adapter has other weights: the next requests' blends are of these."""
        for entry in self._registrations.known.blends_with(part.number):
            is_first = part.pack is None and entry.pack is None
            if is_first or entry.is_blended_of(part.number, digest):
                continue
            entry.is_outdated = True
            # What is under way for it may have read the part before.
            if entry.ticket is not None:
                self._load_requests.cancel(entry)
                self._load_requests.ask(entry)
            if entry.is_being_checked:
                self._load_requests.check(entry, fresh=True)

    def _take_failed(self, message: Failed) -> None:
        entry = self._load_requests.find(message.ticket)
        if entry is None:
            return
        is_check = message.ticket == entry.check_ticket
        self._load_requests.end(entry, message.ticket)
        failure = LoadFailure(message.kind, message.message)
        self._refuse(entry, failure, message.problems, is_check=is_check)

    def _refusal(self, entry: AdapterEntry, pack: PackInfo) -> LoadFailure | None:
        """Why a version must not be served; None if it may."""
        if self._required is None:
            return None
        if entry.blend is None:
            refusal = self._required.refuse(entry.request.lora_name, pack.digest)
        else:
            refusals = (
                (part.name, self._required.refuse(part.name, digest))
                for part, digest in zip(entry.blend.parts, pack.parts, strict=True)
            )
            refusal = next((f"of its part {name!r}, {why}" for name, why in refusals if why), None)
        return None if refusal is None else LoadFailure(FailureKind.INVALID, refusal)

    def _refuse(
        self,
        entry: AdapterEntry,
        failure: LoadFailure,
        problems: list[dict[str, Any]],
        *,
        is_check: bool,
    ) -> None:
        """What a load request has brought cannot be served."""
        if is_check or entry.pack is None or entry.is_outdated or not entry.is_reload_asked:
            self._fail(entry, failure, problems)
        else:
            # Only those that asked for the reload fail; the version before serves the others.
            entry.is_reload_asked, entry.reload_failure = False, failure
            self._observer.failed(entry.request, failure)
            self.settle(entry)

    def _take_fill(self, rank: int, answer: Filled | FillFailed, under_way: UnderWay) -> None:
        entry = under_way.entry
        if isinstance(answer, Filled):
            if rank == 0 and answer.seconds is not None:
                self._observer.copied(entry.request, answer.seconds)
            if self._slots.filled(answer.order, rank):
                entry.times_gone = 0
                self.settle(entry)
        elif self._slots.fill_failed(answer.order) is not None:
            if (failure := self._failure(rank, answer, under_way)) is not None:
                self._fail(entry, failure, [])
            elif entry.pack is under_way.order.pack:
                entry.in_host = False  # its requests ask for it again

    def _take_check(self, rank: int, answer: Filled | FillFailed, under_way: UnderWay) -> None:
        entry = under_way.entry
        if isinstance(answer, Filled) and under_way.unanswered:
            return
        entry.check_order = None
        failure = self._failure(rank, answer, under_way) if isinstance(answer, FillFailed) else None
        if failure is not None:
            self._fail(entry, failure, [])
        elif under_way.is_lost or isinstance(answer, FillFailed):
            self._load_requests.check(entry, fresh=False)
        else:
            entry.times_gone = 0
            under_way.is_leased = False  # it is the adapter's now
            self._take_pack(entry, under_way.order.pack, has_lease=True, is_check=True)
            self.settle(entry)

    def _failure(self, rank: int, answer: FillFailed, under_way: UnderWay) -> LoadFailure | None:
        """Why an order has failed; None where its pack has gone: the adapter is loaded again.

        That helps if the pack has gone with its store. It does not if the worker cannot reach the
        store, which has the pack: it has no descriptor left, or somebody has removed the socket.
        """
        if under_way.is_lost:
            return None
        if not answer.is_gone:
            return LoadFailure(answer.kind, answer.message)
        entry = under_way.entry
        entry.times_gone += 1
        if entry.times_gone <= MAX_TIMES_GONE:
            return None
        logger.error(
            "Adapter %r: worker %d could not have it from the store: %s",
            *(entry.request.lora_name, rank, answer.message),
        )
        return LoadFailure(answer.kind, _OUT_OF_REACH)

    def _fail(
        self, entry: AdapterEntry, failure: LoadFailure, problems: list[dict[str, Any]]
    ) -> None:
        entry.failure = failure
        self._observer.failed(entry.request, failure)
        if not entry.is_requested:
            self._load_requests.release(entry)
        if not entry.is_being_checked:  # else registrations get the check's answer
            self._registrations.fail(entry, problems)
