"""Slots: which adapter is in which, and who gives up its own.

Decided once, in the engine core; workers are told to copy and answer. Pure logic, deterministic in
the calls made, one caller at a time.

What the scheduler does with it in each step:

```
slots.begin_step(adapters of the batch's requests that have not ended)
for each waiting request that has its turn:
    if slots.admit(adapter, pack): it may run
    elif order := slots.assign(adapter, pack): tell all workers to copy; the request waits
slots.running(adapters of all running requests)
```
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import MIB
from vllm_multilora.slots.events import SlotEvents, Tier
from vllm_multilora.slots.pins import Pins
from vllm_multilora.slots.policies.policy import CachePolicy, PolicyTier

MAX_SLOTS = 2**15 - 2
"""What the kernels' plans can number."""

COPY_S = 0.002
"""Seconds that a step waits for copies; otherwise requests run a step later, ten times that."""

AWAITED_BYTES = 4 * MIB
"""The largest adapters that are waited for: a processor copies them in less than a millisecond."""


@dataclass(frozen=True)
class Assignment:
    """An order to copy an adapter's weights into a slot, on all ranks; answers name its number."""

    order: int
    slot: int
    adapter_id: int
    pack: int


@dataclass
class _Place:
    """What is in a slot, or on its way there."""

    order: Assignment
    missing_ranks: set[int]  # none: it is filled


class SlotAssignment(PolicyTier):
    """The slots of one engine, and the adapters in them.

    An adapter keeps its slot while any of these is true, and only then cannot be displaced: it is
    in the running batch; it was admitted or assigned in the current step or the one before, so
    that its request may still come for it; its weights are being copied; it is pinned.

    Workers carry orders for one slot out in the order in which they were given. An answer counts
    only for the latest order of its slot: one that comes late, after the slot was given to another
    adapter, cleared or lost, is ignored.

    Args:
        policy: Chooses who gives up its slot; every adapter has size and cost 1.
        events: Told of look-ups, assignments and evictions; by default nobody is.
        ranks: Workers that answer each order.
        pinned_names: Adapters that the settings pin; see `Pins`.

    Attributes:
        pins: The pinned adapters.

    Raises:
        ConfigError: `slots` or `ranks` is no positive integer up to `MAX_SLOTS`, or too many
            adapters are pinned.
    """

    def __init__(
        self,
        slots: int,
        policy: CachePolicy,
        events: SlotEvents | None = None,
        *,
        ranks: int = 1,
        pinned_names: Collection[str] = (),
    ) -> None:
        for name, number in (("slots", slots), ("ranks", ranks)):
            is_whole = isinstance(number, int) and not isinstance(number, bool)
            if not is_whole or not 1 <= number <= MAX_SLOTS:
                raise ConfigError(
                    f"the number of {name} must be a positive integer, at most {MAX_SLOTS}, got "
                    f"{number!r}"
                )
        super().__init__(policy)
        self.pins = Pins(slots, pinned_names)
        self._ranks = ranks
        self._events = events if events is not None else SlotEvents()
        self._read: set[int] = set()  # because a request waited, since they last joined the batch
        self._brought: set[int] = set()  # into a slot, since they last joined the batch
        self._contents: list[int | None] = [None] * slots
        self._places: dict[int, _Place] = {}  # by adapter
        self._successors: dict[int, _Place] = {}  # of adapters whose requests are to go on with it
        self._orders: dict[int, int] = {}  # adapters by unanswered orders
        self._numbers = itertools.count()  # of orders
        self._active: frozenset[int] = frozenset()  # of the batch, but for those that have left it
        self._admitted: set[int] = set()  # since the batch was told
        # Asked for in this step, and in the one before.
        self._requested: set[int] = set()
        self._requested_before: set[int] = set()

    # What is where

    @property
    def contents(self) -> tuple[int | None, ...]:
        """The adapter in each slot, or on its way there."""
        return tuple(self._contents)

    def slot_of(self, adapter_id: int) -> int | None:
        """The adapter's slot, be it filled or not; None if it has none."""
        place = self._places.get(adapter_id)
        return None if place is None else place.order.slot

    def pack_in(self, adapter_id: int) -> int | None:
        """The newest version that is in a slot, or on its way there; None without a slot."""
        place = self._successors.get(adapter_id) or self._places.get(adapter_id)
        return None if place is None else place.order.pack

    def is_filled(self, adapter_id: int, pack: int) -> bool:
        """Whether all ranks have this version of the adapter in its slot."""
        place = self._places.get(adapter_id)
        return place is not None and not place.missing_ranks and place.order.pack == pack

    def is_awaited(self, adapter_id: int) -> bool:
        """Whether the adapter has a slot that some rank has not filled, or that is not used yet."""
        place = self._places.get(adapter_id)
        return adapter_id in self._successors or bool(place and place.missing_ranks)

    def is_protected(self, adapter_id: int) -> bool:
        """Whether the adapter keeps its slot, should it have one."""
        return (
            adapter_id in self._active
            or adapter_id in self._requested
            or adapter_id in self._requested_before
            or adapter_id in self.pins
            or self.is_awaited(adapter_id)
        )

    @property
    def unfilled(self) -> frozenset[int]:
        """Adapters of the running batch whose weights are in no slot.

        There are some after `clear_all`, or if one was unloaded while it ran: no step may be
        computed with them before they were assigned and filled again.
        """
        return frozenset(
            adapter_id
            for adapter_id in self._running
            if (place := self._places.get(adapter_id)) is None or place.missing_ranks
        )

    # Steps

    def begin_step(self, active: frozenset[int]) -> None:
        """Tells which of the running batch's adapters have requests: the others' slots may go."""
        self._active = active

    def running(self, adapters: frozenset[int]) -> None:
        """Tells the adapters of the running batch; once a step, when it has been scheduled.

        They are protected until the next call, and reported to the policy. Those that were not in
        the preceding batch are looked up: a hit if they had a slot before they were asked for.
        """
        self._requested_before, self._requested = self._requested, set()
        self._admitted.clear()
        joined = adapters - self._running
        self._active = adapters
        self.used(adapters)
        for adapter_id in sorted(joined):
            # It was copied into its slot before it joined: what counts is what was there before.
            if adapter_id not in self._brought:
                self._events.hit(Tier.GPU, adapter_id)
            else:
                self._events.miss(Tier.GPU, adapter_id)
                count = self._events.miss if adapter_id in self._read else self._events.hit
                count(Tier.CPU, adapter_id)
        self._read -= joined
        self._brought -= joined

    def admit(self, adapter_id: int, pack: int) -> bool:
        """Whether a request may run with this version of the adapter; protects it if so."""
        if not self.is_filled(adapter_id, pack):
            return False
        self._requested.add(adapter_id)
        self._admitted.add(adapter_id)
        return True

    def assign(self, adapter_id: int, pack: int) -> Assignment | None:
        """Gives an adapter a slot: a free one, the lowest, or that of the policy's victim.

        An adapter that has another version of itself in its slot keeps the slot.

        Returns:
            The copy to make. None if there is nothing to do now: this version is in the slot or
            on its way there (`slot_of` is its slot), the running batch uses another version of
            it, or no slot can be spared.

        Raises:
            PolicyError: The policy chose an adapter that was not offered.
        """
        place = self._places.get(adapter_id)
        if place is not None:
            self._requested.add(adapter_id)
            is_used = adapter_id in self._active or adapter_id in self._admitted
            if place.order.pack == pack or is_used or adapter_id in self._successors:
                return None
            slot: int | None = place.order.slot
            self._leave(adapter_id)
        else:
            slot = self._spare()
        if slot is None:
            return None
        self._add(adapter_id, size=1, cost=1.0)
        if adapter_id not in self._running:  # one that runs is not looked up
            self._brought.add(adapter_id)
        return self._take(slot, adapter_id, pack, self._places)

    def assign_beside(self, adapter_id: int, pack: int) -> Assignment | None:
        """As `assign`, beside the slot that the adapter has, which it goes on using."""
        if self.is_awaited(adapter_id):
            return None
        self._requested.add(adapter_id)  # its own is not the one to be spared
        slot = self._spare()
        return None if slot is None else self._take(slot, adapter_id, pack, self._successors)

    def succeed(self, adapter_id: int, pack: int) -> int | None:
        """Frees an adapter's slot, once all ranks have this version in the one beside: its slot."""
        place = self._successors.get(adapter_id)
        if place is None or place.missing_ranks or place.order.pack != pack:
            return None
        before, self._places[adapter_id] = self._places[adapter_id], place
        del self._successors[adapter_id]
        self._free(adapter_id, before)
        return place.order.slot

    def give_up_successor(self, adapter_id: int) -> None:
        """The version in the slot beside an adapter's own is not to be used."""
        if (place := self._successors.pop(adapter_id, None)) is not None:
            self._free(adapter_id, place)

    def _spare(self) -> int | None:
        """A free slot, the lowest, or that of the policy's victim; None if there is none."""
        if None in self._contents:
            return self._contents.index(None)
        idle = [i for i in sorted(self._places) if not self.is_protected(i)]
        if not idle:
            return None
        displaced = self._choose(idle)
        slot = self._leave(displaced)
        self._events.evicted(Tier.GPU, displaced)
        return slot

    def read_on_demand(self, adapter_id: int) -> None:
        """Notes that the adapter's files were read because a request waited: a CPU miss."""
        self._read.add(adapter_id)

    # Answers

    def filled(self, order: int, rank: int = 0) -> bool:
        """Notes a rank's answer; whether all have filled the slot; `ValueError`: no such rank."""
        if not 0 <= rank < self._ranks:
            raise ValueError(f"rank {rank} answered an order and there are {self._ranks} ranks")
        adapter_id = self._orders.get(order)
        if adapter_id is None:
            return False
        place = self._successors.get(adapter_id)
        if place is None or place.order.order != order:
            place = self._places[adapter_id]
        place.missing_ranks.discard(rank)
        if place.missing_ranks:
            return False
        del self._orders[order]
        self._events.filled(adapter_id, place.order.slot)
        return True

    def fill_failed(self, order: int) -> int | None:
        """A rank could not carry an order out: whose slot is free again; None: it is stale."""
        adapter_id = self._orders.get(order)
        if adapter_id in self._successors:
            self.give_up_successor(adapter_id)
        elif adapter_id is not None:
            self._leave(adapter_id)
        return adapter_id

    # Losing slots

    def missing(self, adapter_id: int) -> None:
        """A rank was without the adapter though its slot was filled: the slot is free, pins stay.

        If the slot is being filled again already, nothing is changed.
        """
        place = self._places.get(adapter_id)
        if place is not None and not place.missing_ranks:
            self._leave(adapter_id)

    def clear(self, adapter_id: int) -> None:
        """The adapter was unloaded: it gives up its slot, its pin and whatever is noted of it."""
        if adapter_id in self._places:
            self._leave(adapter_id)
        noted = self._admitted, self._requested, self._requested_before, self._read, self._brought
        for adapters in noted:
            adapters.discard(adapter_id)
        self.pins.forget(adapter_id)

    def clear_all(self) -> None:
        """The weights in all slots are lost (sleep, new base weights); pins stay."""
        for adapter_id in sorted(self._places):
            self._leave(adapter_id)

    def _take(self, slot: int, adapter_id: int, pack: int, places: dict[int, _Place]) -> Assignment:
        assignment = Assignment(next(self._numbers), slot, adapter_id, pack)
        self._contents[slot] = adapter_id
        places[adapter_id] = _Place(assignment, set(range(self._ranks)))
        self._orders[assignment.order] = adapter_id
        self._requested.add(adapter_id)
        self._events.assigned(adapter_id, slot)
        return assignment

    def _leave(self, adapter_id: int) -> int:
        self.give_up_successor(adapter_id)
        place = self._places.pop(adapter_id)
        self._remove(adapter_id)
        self._free(adapter_id, place)
        return place.order.slot

    def _free(self, adapter_id: int, place: _Place) -> None:
        self._contents[place.order.slot] = None
        self._orders.pop(place.order.order, None)
        self._events.left(adapter_id, place.order.slot)
