"""Which adapters an engine core knows: all that were asked for, until there are too many."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.adapters.signing.required import RequiredDigests
from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.integration.engine.adapters.adapter_machine import (
    AdapterMachine,
    Surroundings,
)
from vllm_multilora.integration.engine.adapters.exchange import Exchange
from vllm_multilora.integration.engine.adapters.observer import AdapterObserver
from vllm_multilora.slots.assignment import SlotAssignment

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

MAX_KNOWN = 65_536
"""Adapters above which those that are nowhere and that nobody waits for are forgotten."""

_TRIES = 64  # for each new adapter; those that cannot be forgotten go to the end of the line


class KnownAdapters:
    """The known adapters by their numbers, those longest not asked for first.

    Args:
        exchange, slots, observer, required: As of `Surroundings`.
        most_blends: Blends of each tenant that there may be at a time: clients can request any
            number of them. A blend is made when a request asks for it, and made again if it has
            left memory, so one that nobody uses can be forgotten as soon as there are too many.

    Attributes:
        swapping: As of `Surroundings`.
    """

    def __init__(
        self,
        exchange: Exchange[AdapterMachine],
        slots: SlotAssignment,
        observer: AdapterObserver,
        required: RequiredDigests | None = None,
        most_blends: int = 0,
    ) -> None:
        self._around = Surroundings(exchange, slots, observer, required, self._forget)
        self.swapping, self._most_blends = self._around.swapping, most_blends
        self._adapters: OrderedDict[int, AdapterMachine] = OrderedDict()
        self._at_path: Counter[str] = Counter()
        self._blends: OrderedDict[int, AdapterMachine] = OrderedDict()

    def __len__(self) -> int:
        return len(self._adapters)

    def __iter__(self) -> Iterator[AdapterMachine]:
        return iter(self._adapters.values())

    def __getitem__(self, number: int) -> AdapterMachine:
        return self._adapters[number]

    def find(self, number: int) -> AdapterMachine | None:
        return self._adapters.get(number)

    def release(self) -> None:
        """Gives all leases back."""
        for adapter in list(self._around.leased):
            adapter.release()

    def blends_with(self, number: int) -> list[AdapterMachine]:
        """The blends that an adapter is a part of."""
        return list(self._around.by_part.get(number, ()))

    def refusal(self, request: LoRARequest, tenant: str) -> LoadFailure | None:
        """Why a request's adapter may not be known; idle blends of the tenant are forgotten."""
        known = self.find(request.lora_int_id)
        if known is None:
            return self._blend_refusal(tenant) if is_blend(request.lora_path) else None
        if not known.is_requested or known.request.lora_path == request.lora_path:
            return None
        return LoadFailure(
            FailureKind.INVALID,
            f"its number {known.number} is that of adapter {known.request.lora_name!r}, whose "
            "requests have not ended: give every adapter a number of its own",
        )

    def _blend_refusal(self, tenant: str) -> LoadFailure | None:
        if not self._most_blends:
            refusal = "blends are switched off here (--multilora-max-blends 0)"
            return LoadFailure(FailureKind.INVALID, refusal)
        own = [blend for blend in self._blends.values() if blend.blend_owner == tenant]
        if len(own) < self._most_blends:
            return None
        for blend in own:  # those longest not asked for first
            if not blend.is_requested and not blend.registrations:
                blend.withdrawn()
                return None
        counts = Counter(blend.blend_owner for blend in self._blends.values())
        for blend in own:  # nobody keeps another tenant from its own by using them
            for other in sorted(blend.owners):
                if counts[other] < self._most_blends:
                    blend.blend_owner = other
                    return None
        return RequestFailure(
            FailureKind.NO_MEMORY,
            f"the limit of blends in use at a time ({self._most_blends}, --multilora-max-blends) "
            "is reached; try again later",
        )

    def known_for(self, request: LoRARequest, tenant: str = "") -> AdapterMachine:
        """What is known of a request's adapter; another path under its number is another one.

        API servers register those of directories, and blends, when they are first asked for, and
        another version of a directory's adapter when its files have changed: nobody waits for
        that, since the version before serves meanwhile.
        """
        number, path = request.lora_int_id, request.lora_path
        known = self.find(number)
        if known is not None and known.request.lora_path != path:
            known.withdrawn()
            known = None
        if known is None:
            self._make_room()
            on_request = number >= FIRST_NUMBER and not self._at_path[path]
            known = AdapterMachine(request, self._around, on_request=on_request)
            self._adapters[number] = known
            self._at_path[path] += 1
            if known.blend is not None:
                known.blend_owner = tenant
                self._blends[number] = known
                for part in known.blend.numbers:
                    self._around.by_part.setdefault(part, {})[known] = None
            slots, observer = self._around.slots, self._around.observer
            observer.known(request)
            if slots.pins.note(number, request.lora_name):
                observer.pinned(slots.pins.adapters)
        known.request = request
        self._asked_for(known)
        return known

    def move(self, adapter: AdapterMachine, path: str) -> None:
        """Another path under an adapter's number is that of its next version."""
        for place, count in (adapter.request.lora_path, -1), (path, 1):
            self._at_path[place] += count
        adapter.request = msgspec.structs.replace(adapter.request, lora_path=path)

    def evict(self, pack: int) -> None:
        """A pack has left host memory."""
        for adapter in self._around.by_pack.pop(pack, ()):
            adapter.evicted()

    def lose_store(self) -> None:
        """A store is a new one: it holds nothing.

        Leases are given back all the same: with workers on several machines, the other machines'
        stores still hold their part, and a new store does not mind.
        """
        self.release()
        self._around.by_pack.clear()
        for adapter in self:
            adapter.store_lost()
        self._around.exchange.store_lost()

    def _asked_for(self, adapter: AdapterMachine) -> None:
        """It is the last one now."""
        self._adapters.move_to_end(adapter.number)
        if adapter.number in self._blends:
            self._blends.move_to_end(adapter.number)

    def _make_room(self) -> None:
        """Forgets adapters that are only known by name; the store is not told to."""
        for adapter in list(itertools.islice(self, _TRIES)):
            if len(self) < MAX_KNOWN:
                return
            if adapter.is_idle:
                self._forget(adapter)
            else:
                self._asked_for(adapter)

    def _forget(self, adapter: AdapterMachine) -> None:
        number, path, around = adapter.number, adapter.request.lora_path, self._around
        del self._adapters[number]
        self._at_path[path] -= 1
        if not self._at_path[path]:
            del self._at_path[path]
        if self._blends.pop(number, None) is not None and adapter.blend is not None:
            for part in adapter.blend.numbers:
                others = around.by_part[part]
                del others[adapter]
                if not others:
                    del around.by_part[part]
        adapter.leave_pack()
        around.swapping.pop(adapter, None)
        pinned = around.slots.pins.adapters
        around.slots.clear(number)
        around.observer.forgotten(adapter.request)
        if number in pinned:  # by its name, then, the version before is
            around.observer.pinned(around.slots.pins.adapters)
