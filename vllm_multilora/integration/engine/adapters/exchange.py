"""What an engine core has asked its store and its workers, until they have answered."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from vllm_multilora.adapters.files.regular_file import Fingerprint
from vllm_multilora.integration.engine.workers.machines import MachineStores
from vllm_multilora.integration.engine.workers.workers import LinkedWorkers
from vllm_multilora.integration.worker_link.fill_link import Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Check, Order, Swap
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import LoadRequest, PackInfo, ToUser

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_A = TypeVar("_A")
"""What stands for an adapter."""


@dataclass(eq=False)
class PendingLoad(Generic[_A]):
    """A load request that the store has not answered.

    Attributes:
        adapter: Whose it is.
        ticket: What the answer names.
        keys: State of the file of signing keys when it was made; None: none need have signed.
        is_reading: Whether the store is at it.
    """

    adapter: _A
    ticket: int
    keys: Fingerprint | None
    is_reading: bool = False


@dataclass(eq=False)
class UnderWay(Generic[_A]):
    """An order that some worker has not answered: it may still be reading the pack.

    Attributes:
        adapter: Whose it is.
        order: As it was sent.
        unanswered: Ranks that have not answered.
        is_leased: Whether the order has a lease on the pack; it ends when all have answered.
        is_lost: Whether the pack has gone all the same, with its store.
    """

    adapter: _A
    order: Order
    unanswered: set[int]
    is_leased: bool = True
    is_lost: bool = False


class Exchange(Generic[_A]):
    """Load requests and orders, each with its adapter; for the engine core's main thread.

    Args:
        store, workers: Who is asked; nothing but their `poll` ever waits.
        ranks: Number of workers.
        signing_keys: File of keys by one of which adapters must be signed; None: none need be.
    """

    def __init__(
        self,
        store: StoreClient | MachineStores,
        workers: LinkedWorkers,
        ranks: int,
        signing_keys: str | None,
    ) -> None:
        self.store = store
        self.workers = workers
        self._signing_keys = signing_keys
        self._ranks = ranks
        self._loads: dict[int, PendingLoad[_A]] = {}
        self._leases: set[int] = set()  # tickets that a lease on what is in memory will answer
        self._leaving: defaultdict[int, deque[Future[bool]]] = defaultdict(deque)
        self._under_way: dict[int, UnderWay[_A]] = {}
        self._check_numbers = itertools.count(-1, -1)  # those of slots' orders ascend from 0
        self._outbox: list[Order] = []

    # The store

    def load(
        self, adapter: _A, asked: LoadRequest, *, in_host: bool, checked_under: Fingerprint | None
    ) -> PendingLoad[_A]:
        """Requests an adapter.

        Args:
            adapter: Whose request it is.
            asked: What is asked.
            in_host: Whether the newest version is in host memory.
            checked_under: State of the file of signing keys when that was asked for.
        """
        keys = None
        if self._signing_keys is not None:
            keys = Fingerprint.at(self._signing_keys)
            if keys is None or keys != checked_under:
                # What one key has signed may be in memory after the key has gone.
                asked = msgspec.structs.replace(asked, fresh=True)
        load = PendingLoad(adapter, self.store.request_load(asked), keys)
        self._loads[load.ticket] = load
        if asked.keep and in_host and not asked.fresh:
            self._leases.add(load.ticket)
        return load

    def cancel(self, load: PendingLoad[_A]) -> None:
        """Takes a load request back."""
        self.store.cancel(load.ticket)
        self.end(load.ticket)

    def find(self, ticket: int) -> PendingLoad[_A] | None:
        """The load request of a ticket; None if it is over."""
        return self._loads.get(ticket)

    def end(self, ticket: int) -> PendingLoad[_A] | None:
        """A load request is over; returns it, None if it was before."""
        self._leases.discard(ticket)
        return self._loads.pop(ticket, None)

    def forget(self, number: int) -> Future[bool]:
        """Has the store forget an adapter; done when it has."""
        gone: Future[bool] = Future()
        self._leaving[number].append(gone)
        self.store.forget(number)
        return gone

    def forgotten(self, number: int) -> None:
        """The store has forgotten an adapter."""
        if futures := self._leaving.get(number):
            futures.popleft().set_result(True)
            if not futures:
                del self._leaving[number]

    def hear(self, take: Callable[[ToUser], None], patience_s: float) -> None:
        """Takes in what the store has said; waits so long for leases on what is in host memory."""
        for message in self.store.poll():
            take(message)
        deadline = time.monotonic() + patience_s
        while self._leases and (left := deadline - time.monotonic()) > 0:
            for message in self.store.poll(left):
                take(message)
        if patience_s:
            self._leases.clear()  # nobody waits for them twice

    def store_lost(self) -> None:
        """The store is a new one: packs that orders read may have gone, and it has none to forget.

        Load requests go on.
        """
        for under_way in self._under_way.values():
            under_way.is_lost = True
        leaving, self._leaving = self._leaving, defaultdict(deque)
        for future in itertools.chain.from_iterable(leaving.values()):
            future.set_result(True)

    # The workers

    def order(self, adapter: _A, order: Order) -> UnderWay[_A]:
        """Gives workers an order, with a lease on its pack; it goes with the next `send`."""
        under_way = UnderWay(adapter, order, set(range(self._ranks)))
        self._under_way[order.order] = under_way
        self._outbox.append(order)
        return under_way

    def swap(self, request: LoRARequest, pack: PackInfo, slot: int) -> None:
        """Has workers use the slot that was filled beside an adapter's own, without an answer."""
        self._outbox.append(Swap(next(self._check_numbers), request, pack, slot=slot))

    def check(self, adapter: _A, request: LoRARequest, pack: PackInfo) -> UnderWay[_A]:
        """Has workers check a pack."""
        return self.order(adapter, Check(next(self._check_numbers), request, pack))

    def answered(self, rank: int, answer: Filled | FillFailed) -> UnderWay[_A] | None:
        """The order that a rank has answered; None if nobody knows it."""
        under_way = self._under_way.get(answer.order)
        if under_way is not None:
            under_way.unanswered.discard(rank)
            if not under_way.unanswered:
                del self._under_way[answer.order]
        return under_way

    def send(self, wait_s: float = 0.0, poll: Callable[[float, float], None] | None = None) -> None:
        """Sends what is due; where everybody waits, polls until workers have answered."""
        if self._outbox:
            orders, self._outbox = self._outbox, []
            self.workers.send(orders)
        until = time.monotonic() + wait_s
        while poll and self._under_way and (left := until - time.monotonic()) > 0:
            poll(0.0, left)
