"""Presents the stores of several machines as one.

Where an engine's workers are on several machines, each machine's store packs adapters for the
workers there. An adapter is loaded when all of them have it; all must have read the same files.

All machines read at once, but an adapter gets its leases in the order of the machines. If two
adapters held what each of them waits for, one on this machine and the other on that one, both
would wait for ever. What a machine has loaded before its turn stays in its memory without a lease,
and is asked for again in its turn: nothing is read twice unless it has been evicted meanwhile.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol import messages as msg


@dataclass(eq=False)
class _LoadRequest:
    """One want of the engine core's, and what each machine has to say.

    Attributes:
        load_request: What is asked of each machine.
        tickets: Of the machines' own wants; None where an answer is not waited for.
        loaded: What has come so far; None where nothing has, or where its lease was given back.
        seconds: The longest that a machine has taken for an answer.
        was_read: Whether a machine has read files for it.
    """

    load_request: msg.LoadRequest
    tickets: list[int | None]
    loaded: list[msg.Loaded | None]
    seconds: float = 0.0
    was_read: bool = False


@dataclass(eq=False)
class _Pack:
    """An adapter's packs on all machines."""

    parts: tuple[msg.PackInfo, ...]
    leases: int = 0
    is_lost: bool = False  # on some machine; it is kept until its leases are given back


class MachineStores:
    """What the engine core asks of all stores, like a `StoreClient`; packs have own numbers.

    Args:
        clients: One for each machine, each configured with the layouts of its workers. The first
            is the engine core's own machine's.
    """

    def __init__(self, clients: Sequence[StoreClient]) -> None:
        self._clients = list(clients)
        self._tickets = itertools.count(1)
        self._numbers = itertools.count(1)
        self._load_requests: dict[int, _LoadRequest] = {}
        self._own_ticket: list[dict[int, int]] = [{} for _ in clients]
        self._packs: dict[int, _Pack] = {}
        self._own_pack: dict[tuple[int, ...], int] = {}
        # Of each adapter, in the order in which it was to be forgotten: who has not answered.
        self._leaving: defaultdict[int, deque[set[int]]] = defaultdict(deque)
        self._totals: list[msg.Totals | None] = [None] * len(self._clients)

    @property
    def address(self) -> str:
        return self._clients[0].address

    def elsewhere(self, pack: int) -> tuple[msg.PackInfo, ...]:
        """A pack as it lies on the other machines, in their order."""
        known = self._packs.get(pack)
        return () if known is None else known.parts[1:]

    def request_load(self, load_request: msg.LoadRequest) -> int:
        ticket = next(self._tickets)
        count = len(self._clients)
        asked = self._load_requests[ticket] = _LoadRequest(
            load_request, [None] * count, [None] * count
        )
        for machine in range(count):
            self._ask(machine, ticket, asked)
        # What is asked for again has been looked at since it was wanted.
        asked.load_request = msgspec.structs.replace(load_request, fresh=False)
        return ticket

    def share(self, ticket: int, owner: str) -> None:
        asked = self._load_requests.get(ticket)
        if asked is None or owner in asked.load_request.owners:
            return
        owners = (*asked.load_request.owners, owner)
        asked.load_request = msgspec.structs.replace(asked.load_request, owners=owners)
        for client, part in zip(self._clients, asked.tickets, strict=True):
            if part is not None:
                client.share(part, owner)

    def cancel(self, ticket: int) -> None:
        asked = self._load_requests.pop(ticket, None)
        if asked is not None:
            self._take_back(asked)

    def release(self, pack: int) -> None:
        known = self._packs.get(pack)
        if known is None:
            return
        known.leases -= 1
        for client, part in zip(self._clients, known.parts, strict=True):
            client.release(part.pack)
        if known.is_lost and known.leases <= 0:
            del self._packs[pack]

    def used(self, packs: Sequence[int]) -> None:
        known = [self._packs[pack].parts for pack in packs if pack in self._packs]
        for machine, client in enumerate(self._clients):
            client.used([parts[machine].pack for parts in known])

    def forget(self, adapter: int) -> None:
        self._leaving[adapter].append(set(range(len(self._clients))))
        for client in self._clients:
            client.forget(adapter)

    def poll(self, seconds: float = 0.0) -> list[msg.ToUser]:
        came: list[msg.ToUser] = []
        deadline = time.monotonic() + seconds
        for machine, client in enumerate(self._clients):
            # Together no longer, and for no machine that has answered everything.
            waits = bool(self._own_ticket[machine]) and not came
            for message in client.poll(max(0.0, deadline - time.monotonic()) if waits else 0.0):
                came += self._take(machine, message)
        return came

    def start_waking(self, wake: Callable[[], None]) -> None:
        for client in self._clients:
            client.start_waking(wake)

    def say_by(
        self, say: Callable[[Callable[[], None]], None], say_all: Callable[[], None]
    ) -> None:
        for client in self._clients:
            client.say_by(say, say_all)

    def _ask(self, machine: int, ticket: int, asked: _LoadRequest) -> None:
        part = asked.tickets[machine] = self._clients[machine].request_load(asked.load_request)
        self._own_ticket[machine][part] = ticket

    def _take_back(self, asked: _LoadRequest) -> None:
        for machine, part in enumerate(asked.tickets):
            if part is not None:
                self._own_ticket[machine].pop(part, None)
                self._clients[machine].cancel(part)
        self._give_back(asked, 0)

    def _give_back(self, asked: _LoadRequest, first: int) -> None:
        """Leases of this machine and of those after it."""
        for machine in range(first, len(self._clients)):
            loaded = asked.loaded[machine]
            if loaded is not None and loaded.leased:
                self._clients[machine].release(loaded.pack.pack)
                asked.loaded[machine] = None

    def _keep_order(self, ticket: int, asked: _LoadRequest) -> None:
        """No machine after the first that has not loaded an adapter holds a lease on it."""
        if asked.load_request.keep and None in asked.loaded:
            machine = asked.loaded.index(None)
            self._give_back(asked, machine + 1)
            if asked.tickets[machine] is None:
                self._ask(machine, ticket, asked)

    def _take(self, machine: int, message: msg.ToUser) -> list[msg.ToUser]:
        """What follows for the engine core from what a machine's store says."""
        match message:
            case msg.Loaded(part):
                ticket = self._own_ticket[machine].pop(part)
                asked = self._load_requests[ticket]
                asked.tickets[machine], asked.loaded[machine] = None, message
                asked.seconds = max(asked.seconds, message.seconds)
                asked.was_read |= message.was_read
                self._keep_order(ticket, asked)
                return self._merge(ticket, asked)
            case msg.Failed(part):
                ticket = self._own_ticket[machine].pop(part)
                self.cancel(ticket)  # the other machines need not go on
                return [msgspec.structs.replace(message, ticket=ticket)]
            case msg.Reading(part):
                return [msg.Reading(self._own_ticket[machine][part])]
            case msg.Evicted(part):
                self._forget_checked(machine, part)
                return self._lose(lambda parts: parts[machine].pack == part)
            case msg.Forgotten(adapter):
                return self._forgotten(machine, adapter)
            case msg.Totals():
                self._totals[machine] = message
                return self._sum()
            case msg.Restarted():
                return self._start_over(machine)
        return []

    def _merge(self, ticket: int, asked: _LoadRequest) -> list[msg.ToUser]:
        load_request = asked.load_request
        found = [loaded for loaded in asked.loaded if loaded is not None]
        if len(found) < len(self._clients):
            return []
        del self._load_requests[ticket]
        digests = {loaded.pack.digest for loaded in found}
        if len(digests) > 1:
            self._take_back(asked)
            return [
                msg.Failed(
                    ticket,
                    FailureKind.INVALID,
                    f"adapter {load_request.name!r}: the files at {load_request.path} are not the "
                    "same on all "
                    f"machines of this server (BLAKE3 {', '.join(sorted(digests))}): serve "
                    "adapters from one shared folder, or copy the same files everywhere",
                    [],
                )
            ]
        first, parts = found[0], tuple(loaded.pack for loaded in found)
        number = self._number(parts) if all(part.pack for part in parts) else 0
        if first.leased:
            self._packs[number].leases += 1
        return [
            msg.Loaded(
                ticket,
                msgspec.structs.replace(first.pack, pack=number),
                asked.seconds,
                asked.was_read,
                first.leased,
            )
        ]

    def _number(self, parts: tuple[msg.PackInfo, ...]) -> int:
        key = tuple(part.pack for part in parts)
        if key not in self._own_pack:
            number = self._own_pack[key] = next(self._numbers)
            self._packs[number] = _Pack(parts)
        return self._own_pack[key]

    def _lose(self, is_lost: Callable[[tuple[msg.PackInfo, ...]], bool]) -> list[msg.ToUser]:
        """Packs of which a machine's part has gone."""
        lost: list[msg.ToUser] = []
        for key, number in list(self._own_pack.items()):
            known = self._packs[number]
            if is_lost(known.parts):
                del self._own_pack[key]
                known.is_lost = True
                if known.leases <= 0:
                    del self._packs[number]
                lost.append(msg.Evicted(number))
        return lost

    def _forget_checked(self, machine: int, pack: int) -> None:
        """A pack without a lease has gone before all machines had theirs: it was checked only."""
        for asked in self._load_requests.values():
            loaded = asked.loaded[machine]
            if loaded is not None and loaded.pack.pack == pack:
                gone = msgspec.structs.replace(loaded.pack, pack=0)
                asked.loaded[machine] = msgspec.structs.replace(loaded, pack=gone)

    def _forgotten(self, machine: int, adapter: int) -> list[msg.ToUser]:
        waiting = self._leaving.get(adapter, deque())
        for unanswered in waiting:
            if machine in unanswered:
                unanswered.remove(machine)
                break
        answers: list[msg.ToUser] = []
        while waiting and not waiting[0]:
            waiting.popleft()
            answers.append(msg.Forgotten(adapter))
        if not waiting:
            self._leaving.pop(adapter, None)
        return answers

    def _sum(self) -> list[msg.ToUser]:
        """What the machines hold together: bytes add up, adapters are the same ones."""
        known = [totals for totals in self._totals if totals is not None]
        limits = [totals.bytes_limit for totals in known]
        adapters = [t.adapters_limit for t in known if t.adapters_limit is not None]
        return [
            msg.Totals(
                bytes=sum(totals.bytes for totals in known),
                adapters=max(totals.adapters for totals in known),
                bytes_limit=None if None in limits else sum(n for n in limits if n is not None),
                adapters_limit=min(adapters, default=None),
            )
        ]

    def _start_over(self, machine: int) -> list[msg.ToUser]:
        """A machine's store is a new one: no adapter is on all machines any more."""
        self._totals[machine] = None
        self._lose(lambda _: True)
        for ticket, asked in self._load_requests.items():
            if asked.loaded[machine] is not None:
                asked.loaded[machine] = None
                self._ask(machine, ticket, asked)
                self._keep_order(ticket, asked)
        # Whoever waits for an adapter to be forgotten is answered by the restart itself.
        self._leaving.clear()
        return [msg.Restarted()]
