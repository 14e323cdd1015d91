"""What an engine core knows of each adapter."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_multilora.adapters.blend import Blend
from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.adapters.files.regular_file import Fingerprint
from vllm_multilora.failures import LoadFailure
from vllm_multilora.integration.blends import blend_of
from vllm_multilora.slots.assignment import SlotAssignment
from vllm_multilora.states import AdapterState
from vllm_multilora.store.protocol.messages import PackInfo

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(eq=False)
class AdapterEntry:
    """What is known of one adapter.

    Attributes:
        request: The newest request's adapter: number, name and path.
        leases: Of all entries, those whose newest version stays in host memory until it is given
            back.
        is_read_on_request: Whether its registration has a request behind it.
        ticket: Of the outstanding want of requests; None if there is none.
        is_reading: Whether the store is at it.
        pack: The newest version of its weights; None before it was loaded.
        loaded: When that version was first had, in seconds since 1970.
        in_host: Whether that version is in host memory.
        times_gone: How often in a row a worker has not had that memory, with the same store.
        is_outdated: Whether a newer version is to serve: one that was checked, and found no room,
            or a blend of what its parts are now.
        is_reload_asked: Whether a request has asked for its files to be looked at again.
        is_requested: Whether requests wait for it.
        owners: Tenants whose requests do, each with its limit of adapters in host memory.
        failure: Why the last want failed; until the next one.
        reload_failure: Why the last reload that requests asked for failed, with the version before
            to go on with; until the next one.
        registrations: Answered when it has been checked.
        later: Registrations that are answered by the next check: the one that was under way when
            they came may have opened the files before these were written again.
        blend: What it is blended of; None if it is no blend.
        blend_owner: The tenant that a blend counts among the blends of; empty: nobody's.
        check_ticket: Of the outstanding want of registrations.
        check_order: The order by which workers check it.
        checked_under: State of the file of signing keys when the store was asked for what it has.
    """

    request: LoRARequest
    leases: dict[AdapterEntry, None] = field(repr=False)
    is_read_on_request: bool = False
    ticket: int | None = None
    is_reading: bool = False
    pack: PackInfo | None = None
    loaded: float | None = None
    in_host: bool = False
    times_gone: int = 0
    is_outdated: bool = False
    is_reload_asked: bool = False
    is_requested: bool = False
    owners: dict[str, int | None] = field(default_factory=dict)
    failure: LoadFailure | None = None
    reload_failure: LoadFailure | None = None
    registrations: list[Future[bool]] = field(default_factory=list)
    later: list[Future[bool]] = field(default_factory=list)
    check_ticket: int | None = None
    check_order: int | None = None
    checked_under: Fingerprint | None = None
    blend: Blend | None = field(init=False)
    blend_owner: str = ""

    def __post_init__(self) -> None:
        self.blend = blend_of(self.request)

    @property
    def number(self) -> int:
        return self.request.lora_int_id

    @property
    def is_leased(self) -> bool:
        """Whether its newest version stays in host memory until it is given back."""
        return self in self.leases

    @is_leased.setter
    def is_leased(self, is_leased: bool) -> None:
        if is_leased:
            self.leases[self] = None
        else:
            self.leases.pop(self, None)

    @property
    def is_stale(self) -> bool:
        """Whether its files are to be looked at again before it serves new requests."""
        return self.is_outdated or self.is_reload_asked

    @property
    def serving(self) -> PackInfo | None:
        """The version for new requests; None where that is one still to be had."""
        return None if self.is_stale else self.pack

    @property
    def is_being_checked(self) -> bool:
        return self.check_ticket is not None or self.check_order is not None

    def state(self, slots: SlotAssignment) -> AdapterState:
        """Where the adapter is."""
        if self.failure is not None:
            return AdapterState.FAILED
        pack = self.serving
        if pack is not None:
            if slots.is_filled(self.number, pack.pack):
                return AdapterState.SLOT
            if self.in_host:
                return AdapterState.HOST
        if self.is_reading or self.check_order is not None:
            return AdapterState.READING
        if self.ticket is not None or self.check_ticket is not None:
            return AdapterState.QUEUED
        return AdapterState.ABSENT

    def is_in_slot(self, slots: SlotAssignment, digest: str) -> bool:
        """Whether weights are in the adapter's slot, from whichever pack they came."""
        pack = self.pack
        return (
            pack is not None and pack.digest == digest and slots.is_filled(self.number, pack.pack)
        )

    def is_blended_of(self, part: int, digest: str) -> bool:
        """Whether the newest version of a blend is one of these weights of a part."""
        if self.blend is None or self.pack is None:
            return False
        numbers = (each.number for each in self.blend.parts)
        return (part, digest) in zip(numbers, self.pack.parts, strict=True)

    def is_at_hand(self, slots: SlotAssignment) -> bool:
        """Whether the version to serve is on lease, or in its slot or on its way there."""
        pack = self.serving
        return pack is not None and (self.is_leased or slots.pack_in(self.number) == pack.pack)

    def is_idle(self, slots: SlotAssignment) -> bool:
        """Whether nothing of the adapter is anywhere, and nobody waits for it."""
        return (
            self.state(slots) in (AdapterState.ABSENT, AdapterState.FAILED)
            and self.ticket is None
            and not (self.is_requested or self.is_being_checked or self.registrations)
            and self.number not in slots.pins
            and slots.slot_of(self.number) is None
        )


class Entries:
    """The known adapters by their numbers, those longest not asked for first."""

    def __init__(self) -> None:
        self.leased: dict[AdapterEntry, None] = {}
        self._entries: OrderedDict[int, AdapterEntry] = OrderedDict()
        self._at_path: Counter[str] = Counter()
        self._by_pack: dict[int, dict[AdapterEntry, None]] = {}
        self._blends: OrderedDict[int, AdapterEntry] = OrderedDict()
        self._by_part: dict[int, dict[AdapterEntry, None]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[AdapterEntry]:
        return iter(self._entries.values())

    def __getitem__(self, number: int) -> AdapterEntry:
        return self._entries[number]

    def find(self, number: int) -> AdapterEntry | None:
        return self._entries.get(number)

    def new(self, request: LoRARequest) -> AdapterEntry:
        """Takes in an adapter that is not known.

        API servers register those of directories, and blends, when they are first asked for, and
        another version of a directory's adapter when its files have changed: nobody waits for
        that, since the version before serves meanwhile.
        """
        is_named_by_content = request.lora_int_id >= FIRST_NUMBER
        is_first = not self._at_path[request.lora_path]
        entry = AdapterEntry(
            request, self.leased, is_read_on_request=is_named_by_content and is_first
        )
        self._entries[entry.number] = entry
        self._at_path[request.lora_path] += 1
        if entry.blend is not None:
            self._blends[entry.number] = entry
            for number in entry.blend.numbers:
                self._by_part.setdefault(number, {})[entry] = None
        return entry

    def blends(self) -> list[AdapterEntry]:
        """The entries of blends, in the same order."""
        return list(self._blends.values())

    def blends_with(self, number: int) -> list[AdapterEntry]:
        """The entries of blends that an adapter is a part of."""
        return list(self._by_part.get(number, ()))

    def asked_for(self, entry: AdapterEntry) -> None:
        """It is the last one now."""
        self._entries.move_to_end(entry.number)
        if entry.blend is not None:
            self._blends.move_to_end(entry.number)

    def remove(self, entry: AdapterEntry) -> None:
        del self._entries[entry.number]
        path = entry.request.lora_path
        self._at_path[path] -= 1
        if not self._at_path[path]:
            del self._at_path[path]
        self._blends.pop(entry.number, None)
        for number in () if entry.blend is None else entry.blend.numbers:
            others = self._by_part[number]
            del others[entry]
            if not others:
                del self._by_part[number]
        self._leave_pack(entry)

    def note_pack(self, entry: AdapterEntry, pack: PackInfo) -> None:
        """An adapter's newest version is this one; pack 0 is in nobody's memory."""
        self._leave_pack(entry)
        if entry.pack is None or entry.pack.digest != pack.digest:
            entry.loaded = time.time()
        entry.pack, entry.in_host = pack, pack.pack != 0
        if entry.in_host:
            self._by_pack.setdefault(pack.pack, {})[entry] = None

    def lose_pack(self, pack: int) -> list[AdapterEntry]:
        """A pack has left host memory; returns the adapters that were there by it."""
        lost = list(self._by_pack.pop(pack, ()))
        for entry in lost:
            entry.in_host = entry.is_leased = False
        return lost

    def lose_all_packs(self) -> None:
        """The store has gone, and host memory with it."""
        self._by_pack.clear()
        for entry in self:
            entry.in_host = entry.is_leased = entry.is_reading = False
            entry.times_gone = 0

    def _leave_pack(self, entry: AdapterEntry) -> None:
        known = self._by_pack.get(entry.pack.pack) if entry.pack is not None else None
        if known is not None and entry.pack is not None:
            known.pop(entry, None)
            if not known:
                del self._by_pack[entry.pack.pack]
