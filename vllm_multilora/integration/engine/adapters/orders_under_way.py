"""Orders that workers have not finished: who has answered, and which leases they hold."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

from vllm_multilora.integration.engine.adapters.adapter_entries import AdapterEntry
from vllm_multilora.integration.worker_link.fill_link import Answer, Filled, FillFailed
from vllm_multilora.integration.worker_link.orders import Check, Fill, Order
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.store.protocol.messages import PackInfo


class Workers(Protocol):
    """The engine's workers."""

    def send(self, orders: list[Order]) -> None:
        """Has all workers begin with orders, after the steps that they have."""

    def poll(self, seconds: float = 0.0) -> list[tuple[int, Answer]]:
        """What workers have answered since, each with its rank; waits at most so long."""


@dataclass(eq=False)
class UnderWay:
    """An order that some worker has not answered: it may still be reading the pack.

    Attributes:
        entry: Whose it is.
        order: As it was sent.
        unanswered: Ranks that have not answered.
        is_leased: Whether the order has a lease on the pack; it ends when all have answered.
        is_lost: Whether the pack has gone all the same, with its store.
    """

    entry: AdapterEntry
    order: Order
    unanswered: set[int]
    is_leased: bool = True
    is_lost: bool = False


class OrdersUnderWay:
    """All orders that some worker has not answered."""

    def __init__(self, workers: Workers, slots: SlotAssignment, ranks: int) -> None:
        self._workers = workers
        self._slots = slots
        self._ranks = ranks
        self._under_way: dict[int, UnderWay] = {}
        self._check_numbers = itertools.count(-1, -1)  # those of slots' orders ascend from 0
        self._outbox: list[Order] = []

    def bring(self, entry: AdapterEntry) -> bool:
        """Whether an adapter that is at hand is in its slot; has it copied into one if not.

        Where no slot can be spared nothing happens.
        """
        pack = entry.pack
        assert pack is not None
        if self._slots.admit(entry.number, pack.pack):
            return True
        assignment = self._slots.assign(entry.number, pack.pack)
        if assignment is not None:
            assert entry.is_leased
            entry.is_leased = False  # it is the order's now
            self._give(entry, Fill(assignment.order, entry.request, pack, slot=assignment.slot))
        return False

    def check(self, entry: AdapterEntry, pack: PackInfo) -> None:
        """Has workers check a pack whose lease is the order's from now on."""
        entry.check_order = next(self._check_numbers)
        self._give(entry, Check(entry.check_order, entry.request, pack))

    def answered(self, rank: int, answer: Filled | FillFailed) -> UnderWay | None:
        """The order that a rank has answered; None if nobody knows it."""
        under_way = self._under_way.get(answer.order)
        if under_way is not None:
            under_way.unanswered.discard(rank)
            if not under_way.unanswered:
                del self._under_way[answer.order]
        return under_way

    def poll(self, seconds: float) -> list[tuple[int, Answer]]:
        """What workers say, as of `Workers.poll`."""
        return self._workers.poll(seconds)

    def send(self) -> None:
        if self._outbox:
            orders, self._outbox = self._outbox, []
            self._workers.send(orders)

    def store_lost(self) -> None:
        """A store is a new one: what the orders copy from may be there no more."""
        for under_way in self._under_way.values():
            under_way.is_lost = True

    def _give(self, entry: AdapterEntry, order: Order) -> None:
        self._under_way[order.order] = UnderWay(entry, order, set(range(self._ranks)))
        self._outbox.append(order)
