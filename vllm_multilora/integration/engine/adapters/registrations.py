"""Which adapters an engine core knows, and who is told when one has been checked."""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.integration.engine.adapters.adapter_entries import AdapterEntry, Entries
from vllm_multilora.integration.engine.adapters.load_requests import LoadRequests
from vllm_multilora.integration.engine.adapters.orders_under_way import OrdersUnderWay
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.states import AT_HAND
from vllm_multilora.store.protocol.messages import Loaded

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.engine.adapters.observer import AdapterObserver


MAX_KNOWN = 65_536
"""Adapters above which those that are nowhere and that nobody waits for are forgotten."""

_TRIES = 64  # for each new adapter; those that cannot be forgotten go to the end of the line


class Registrations:
    """The known adapters, and those who are told when one has been checked."""

    def __init__(
        self,
        load_requests: LoadRequests,
        orders: OrdersUnderWay,
        slots: SlotAssignment,
        observer: AdapterObserver,
    ) -> None:
        self.known = Entries()
        self._load_requests = load_requests
        self._orders = orders
        self._slots = slots
        self._observer = observer

    def clash(self, request: LoRARequest) -> LoadFailure | None:
        """Why a request's adapter cannot have its number: another one's requests use it."""
        entry = self.known.find(request.lora_int_id)
        if entry is None or not entry.is_requested:
            return None
        if entry.request.lora_path == request.lora_path:
            return None
        return LoadFailure(
            FailureKind.INVALID,
            f"its number {entry.number} is that of adapter {entry.request.lora_name!r}, whose "
            "requests have not ended: give every adapter a number of its own",
        )

    def find(self, request: LoRARequest) -> AdapterEntry:
        """What is known of a request's adapter; another path under its number is another one."""
        entry = self.known.find(request.lora_int_id)
        if entry is not None and entry.request.lora_path != request.lora_path:
            self.withdraw(entry)
            entry = None
        if entry is None:
            self._make_room()
            entry = self.known.new(request)
            self._observer.known(request)
            if self._slots.pins.note(request.lora_int_id, request.lora_name):
                self._observer.pinned(self._slots.pins.adapters)
        entry.request = request
        self.known.asked_for(entry)
        return entry

    def withdraw(self, entry: AdapterEntry) -> Future[bool]:
        """Forgets an adapter, here and in the store; done when nothing of it is left there."""
        gone = self._load_requests.withdraw(entry)
        self._forget(entry)
        entry.registrations += entry.later
        entry.later = []
        self._refuse(entry, LoadFailure(FailureKind.GONE, "it was removed meanwhile"), [])
        return gone

    def _make_room(self) -> None:
        """Forgets adapters that are only known by name; the store is not told to."""
        for entry in list(itertools.islice(self.known, _TRIES)):
            if len(self.known) < MAX_KNOWN:
                return
            if entry.is_idle(self._slots):
                self._forget(entry)
            else:
                self.known.asked_for(entry)

    def _forget(self, entry: AdapterEntry) -> None:
        self.known.remove(entry)
        pinned = self._slots.pins.adapters
        self._slots.clear(entry.number)
        self._observer.forgotten(entry.request)
        if entry.number in pinned:  # by its name, then, the version before is
            self._observer.pinned(self._slots.pins.adapters)

    def register(self, entry: AdapterEntry, *, fresh: bool) -> Future[bool]:
        """Has an adapter checked, unless it is there; `fresh`: even then.

        One check is under way at a time, and all `fresh` ones that come meanwhile get the next.
        """
        future: Future[bool] = Future()
        entry.failure = None
        if fresh and entry.is_being_checked:
            entry.later.append(future)
            return future
        entry.registrations.append(future)
        is_there = entry.state(self._slots) in AT_HAND
        if not entry.is_being_checked and (fresh or not is_there):
            self._load_requests.check(entry, fresh=fresh)
        return future

    def pin(self, entry: AdapterEntry) -> Future[bool]:
        """Keeps an adapter in its slot once it has one; done when it can be served.

        It counts among the pinned ones at once, so that no more calls than can be kept succeed. If
        it cannot be had, it is pinned no more, unless it was before.

        Raises:
            PinLimitError: All slots but one are pinned already.
        """

        def unpin_what_failed(done: Future[bool]) -> None:
            if done.exception() is not None:
                self._slots.pins.unpin(entry.number)
                self._observer.pinned(self._slots.pins.adapters)

        future: Future[bool] = Future()
        if entry.number not in self._slots.pins:
            self._slots.pins.pin(entry.number)
            self._observer.pinned(self._slots.pins.adapters)
            future.add_done_callback(unpin_what_failed)
        entry.failure = None
        entry.registrations.append(future)
        return future

    def ask_workers(self, entry: AdapterEntry, message: Loaded) -> bool:
        """Has workers check what vLLM fills in itself, if there is any; whether that is under way.

        Until then the version before serves. An adapter that found no room is not checked further:
        its shapes were, by the store.
        """
        pack = message.pack
        if not pack.has_special or not pack.pack or entry.is_in_slot(self._slots, pack.digest):
            return False
        if message.leased:
            self._orders.check(entry, pack)
        else:
            self._load_requests.check(entry, fresh=False, keep=True)
        return True

    def succeed(self, entry: AdapterEntry) -> None:
        registrations = self._take(entry)
        for future in registrations:
            future.set_result(True)
        if registrations and entry.number in self._slots.pins and entry.is_leased:
            self._orders.bring(entry)

    def fail(self, entry: AdapterEntry, problems: list[dict[str, Any]]) -> None:
        """An adapter has failed: so have its registrations, and the version before serves on.

        One that was never served is not known any more.
        """
        assert entry.failure is not None
        if not self._refuse(entry, entry.failure, problems):
            return
        if entry.pack is not None or entry.is_being_checked:
            entry.failure = None
        elif not entry.is_requested:
            self.withdraw(entry)

    def _refuse(
        self, entry: AdapterEntry, failure: LoadFailure, problems: list[dict[str, Any]]
    ) -> bool:
        """Whether there were registrations to refuse."""
        registrations = self._take(entry)
        error = AdapterRefusedError(entry.number, failure, problems)
        for future in registrations:
            future.set_exception(error)
        return bool(registrations)

    def _take(self, entry: AdapterEntry) -> list[Future[bool]]:
        """Takes what a finished check answers, and starts a check for later registrations."""
        registrations, entry.registrations, entry.later = entry.registrations, entry.later, []
        if entry.registrations:
            self._load_requests.check(entry, fresh=True)
        return registrations


class KnownBlends:
    """The blends among the known adapters: few, since clients can request any number of them.

    A blend is made when a request asks for it, and made again if it has left memory. So one that
    nobody uses can be forgotten as soon as there are too many.
    """

    def __init__(self, registrations: Registrations, most: int) -> None:
        self._registrations = registrations
        self._most = most

    def admit(self, request: LoRARequest, tenant: str) -> LoadFailure | None:
        """Why a request's adapter may not be known; idle blends of the tenant are forgotten."""
        known = self._registrations.known
        if not is_blend(request.lora_path) or known.find(request.lora_int_id) is not None:
            return None
        if not self._most:
            refusal = "blends are switched off here (--multilora-max-blends 0)"
            return LoadFailure(FailureKind.INVALID, refusal)
        blends = known.blends()
        own = [entry for entry in blends if entry.blend_owner == tenant]
        if len(own) < self._most:
            return None
        for entry in own:  # those longest not asked for first
            if not entry.is_requested and not entry.registrations:
                self._registrations.withdraw(entry)
                return None
        counts = Counter(entry.blend_owner for entry in blends)
        for entry in own:  # nobody keeps another tenant from its own by using them
            for other in sorted(entry.owners):
                if counts[other] < self._most:
                    entry.blend_owner = other
                    return None
        return RequestFailure(
            FailureKind.NO_MEMORY,
            f"the limit of blends in use at a time ({self._most}, --multilora-max-blends) is "
            "reached; try again later",
        )
