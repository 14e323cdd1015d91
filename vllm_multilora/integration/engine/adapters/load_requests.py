"""What an engine core asks of its store: wants, leases, and forgetting adapters."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from vllm_multilora.adapters.files.regular_file import Fingerprint
from vllm_multilora.integration.engine.adapters.adapter_entries import AdapterEntry
from vllm_multilora.store.protocol.messages import LoadRequest, ToUser

BLENDS = "\0blends"
"""The owner of loads of blends that no tenant asks for: in the store's queue they share a turn."""


class Store(Protocol):
    """What is asked of the store; `StoreClient` is one. Nothing but `poll` ever waits."""

    def request_load(self, load_request: LoadRequest) -> int:
        """Asks for an adapter; returns the ticket that the answer names."""

    def share(self, ticket: int, owner: str) -> None:
        """Another owner waits for what a load request has asked for."""

    def cancel(self, ticket: int) -> None:
        """Takes a load request back."""

    def release(self, pack: int) -> None:
        """Gives the lease on a pack back."""

    def used(self, packs: Sequence[int]) -> None:
        """Steps use these packs: they are worth keeping."""

    def forget(self, adapter: int) -> None:
        """The adapter was withdrawn."""

    def poll(self, seconds: float = 0.0) -> list[ToUser]:
        """What the store has said since; waits at most so long for something, if it can."""


class LoadRequests:
    """Outstanding load requests, each with the entry that its answer is for.

    An entry has one load request of requests and one of registrations at a time.
    """

    def __init__(self, store: Store, signing_keys: str | None) -> None:
        self._store = store
        self._signing_keys = signing_keys
        self._tickets: dict[int, AdapterEntry] = {}
        self._asked_under: dict[int, Fingerprint | None] = {}
        self._leases: set[int] = set()  # tickets that a lease on what is in memory will answer
        self._leaving: defaultdict[int, deque[Future[bool]]] = defaultdict(deque)

    def find(self, ticket: int) -> AdapterEntry | None:
        """The entry whose load request has this ticket; None if that load request is over."""
        return self._tickets.get(ticket)

    def ask(self, entry: AdapterEntry) -> None:
        """Requests an adapter for requests."""
        entry.ticket = self._request_load(entry, keep=True, fresh=entry.is_stale)

    def hear(self, take: Callable[[ToUser], None], patience_s: float) -> None:
        """Takes in what the store has said; waits so long for leases on what is in host memory."""
        for message in self._store.poll():
            take(message)
        deadline = time.monotonic() + patience_s
        while self._leases and (left := deadline - time.monotonic()) > 0:
            for message in self._store.poll(left):
                take(message)
        if patience_s:
            self._leases.clear()  # nobody waits for them twice

    def share(self, entry: AdapterEntry, tenant: str) -> None:
        """One more tenant's requests wait for what was asked: its turn is as good."""
        if entry.ticket is not None:
            self._store.share(entry.ticket, tenant)

    def check(self, entry: AdapterEntry, *, fresh: bool, keep: bool = False) -> None:
        """Requests an adapter for registrations; what is under way for them counts no more.

        Others leave memory for it if `keep`, or if a request will want it as soon as it is
        registered: it would be read twice.
        """
        self._cancel(entry, entry.check_ticket)
        entry.check_order = None
        entry.check_ticket = self._request_load(
            entry, keep=keep or entry.is_read_on_request, fresh=fresh
        )

    def end(self, entry: AdapterEntry, ticket: int) -> Fingerprint | None:
        """A load request is over; returns the state of the signing keys when it was made."""
        del self._tickets[ticket]
        self._leases.discard(ticket)
        entry.is_reading = False
        if ticket == entry.ticket:
            entry.ticket = None
        else:
            entry.check_ticket = None
        return self._asked_under.pop(ticket)

    def cancel(self, entry: AdapterEntry) -> None:
        """Takes the requests' want back, if there is one."""
        self._cancel(entry, entry.ticket)

    def withdraw(self, entry: AdapterEntry) -> Future[bool]:
        """Takes all back that was asked, and has the store forget the adapter; done when it has."""
        self._cancel(entry, entry.ticket)
        self._cancel(entry, entry.check_ticket)
        entry.check_order = None
        self.release(entry)
        gone: Future[bool] = Future()
        self._leaving[entry.number].append(gone)
        self._store.forget(entry.number)
        return gone

    def forgotten(self, number: int) -> None:
        """The store has forgotten an adapter."""
        if futures := self._leaving.get(number):
            futures.popleft().set_result(True)
            if not futures:
                del self._leaving[number]

    def release(self, entry: AdapterEntry) -> None:
        """Gives the entry's lease back, if it has one."""
        if entry.is_leased and entry.pack is not None:
            entry.is_leased = False
            self.release_pack(entry.pack.pack)

    def release_pack(self, pack: int) -> None:
        """Gives one lease on a pack back."""
        self._store.release(pack)

    def used(self, packs: list[int]) -> None:
        """Steps use these packs from now on."""
        self._store.used(packs)

    def store_lost(self) -> None:
        """The store is a new one: it has nothing to forget."""
        leaving, self._leaving = self._leaving, defaultdict(deque)
        for future in itertools.chain.from_iterable(leaving.values()):
            future.set_result(True)

    def _request_load(self, entry: AdapterEntry, *, keep: bool, fresh: bool) -> int:
        request = entry.request
        keys = None
        if self._signing_keys is not None:
            keys = Fingerprint.at(self._signing_keys)
            # What one key has signed may be in memory after the key has gone.
            fresh = fresh or keys is None or keys != entry.checked_under
        load_request = LoadRequest(
            entry.number,
            request.lora_name,
            request.lora_path,
            owners=tuple(entry.owners) or (() if entry.blend is None else (BLENDS,)),
            most=next(iter(entry.owners.values()), None),
            keep=keep,
            fresh=fresh,
        )
        ticket = self._store.request_load(load_request)
        self._tickets[ticket], self._asked_under[ticket] = entry, keys
        if keep and entry.in_host and not fresh:
            self._leases.add(ticket)
        return ticket

    def _cancel(self, entry: AdapterEntry, ticket: int | None) -> None:
        if ticket is not None:
            self._store.cancel(ticket)
            self.end(entry, ticket)
