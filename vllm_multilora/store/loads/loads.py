"""The loads: which job is started, what jobs report, and what those who wait are told."""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_multilora.adapters.blend import title
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.loads.queue import LoadQueue, Purpose, Room
from vllm_multilora.store.memory.arena import Allocation
from vllm_multilora.store.memory.entries import Binding, Client, Load, Owner, Pack, Ticket
from vllm_multilora.store.memory.held_packs import HostMemory
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.job_messages import CheckOnly, Failure, Place, ToJob

MAX_FAILURES = 1024

RETRY_AFTER_S = 2.0
"""Seconds for which a failure is the answer to further load requests."""


class Effects(Protocol):
    """What a registry asks for."""

    def send(self, client: int, message: msg.Message) -> None:
        """Tells a client."""

    def start(self, load: Load) -> None:
        """Starts a load's job."""

    def tell(self, job: int, message: ToJob, segments: tuple[int, ...]) -> None:
        """Tells a job, with the descriptors of segments."""

    def kill(self, job: int) -> None:
        """Ends a job that may be at work; `gone` follows when it cannot write any more."""

    def refusal(self, path: str) -> str | None:
        """Why no job is to be started for a folder; None: it may."""


class Loads:
    """All loads, from the first want to the last answer."""

    def __init__(self, clients: dict[int, Client], memory: HostMemory, effects: Effects) -> None:
        self.queue = LoadQueue()
        self.failures = RecentFailures()
        self._clients = clients
        self._memory = memory
        self._effects = effects
        self._room = Room(memory)
        self._loads: dict[int, Load] = {}
        self._by_adapter: dict[tuple[Binding, str], Load] = {}
        self._dying: dict[int, Allocation | None] = {}
        self._numbers = itertools.count(1)

    def of_adapter(self, binding: Binding, path: str) -> Load | None:
        """The load of an adapter from that folder, if it is on its way."""
        return self._by_adapter.get((binding, path))

    def answer_loaded(
        self, ticket: Ticket, info: msg.PackInfo, now: float, *, was_read: bool
    ) -> None:
        """The want is fulfilled; counts its lease."""
        client = self._clients[ticket.client]
        client.loads.pop(ticket.number, None)
        if ticket.keep:
            self._memory.lease(info.pack)
            client.leases[info.pack] += 1
        message = msg.Loaded(ticket.number, info, now - ticket.arrived, was_read, ticket.keep)
        self._effects.send(ticket.client, message)

    def answer_failed(self, ticket: Ticket, failure: Failure) -> None:
        self._clients[ticket.client].loads.pop(ticket.number, None)
        message = msg.Failed(ticket.number, failure.kind, failure.message, failure.problems)
        self._effects.send(ticket.client, message)

    def withdraw(self, client: int, adapter: int, now: float) -> None:
        """A client has withdrawn an adapter: its load requests fail, whatever the model and folder.

        Without others that wait for a load, nothing that becomes of it is for its adapter any more.
        """
        whose = self._clients[client].server, adapter
        gone = Failure(FailureKind.GONE, f"adapter {adapter} was withdrawn meanwhile", [])
        loads = [
            load
            for load in self._loads.values()
            if (load.binding.server, load.binding.adapter) == whose
        ]
        for load in loads:
            for ticket in load.take_back(lambda ticket: ticket.client == client):
                self.answer_failed(ticket, gone)
            if not load.is_awaited:
                self._leave_adapter(load)
        for load in loads:
            self.end_if_unwanted(load, now)

    def forget_server(self, server: str) -> None:
        """A server has no clients any more: what its loads still bring is for those that follow."""
        self.failures.forget(server)
        for load in self._loads.values():
            if load.binding.server == server:
                self._leave_adapter(load)

    def tick(self, now: float) -> None:
        """Kills jobs that are late, and starts those whose turn it is."""
        for late in self.queue.overdue(now):
            load = self._loads[late]
            message = (
                f"{title(load.path)}: reading and checking has not ended within "
                f"{load.settings.timeout_s:g} s, or has stood still while many others waited"
            )
            self._fail(load, Failure(FailureKind.TIMEOUT, message, []), now)
        while (number := self.queue.start_next(now)) is not None:
            load = self._loads[number]
            refusal = self._effects.refusal(load.path)
            if refusal is not None:
                self._fail(load, Failure(FailureKind.TIMEOUT, refusal, []), now)
                continue
            load.job = True
            for ticket in load.tickets:
                self._effects.send(ticket.client, msg.Reading(ticket.number))
            self._effects.start(load)

    def opened(self, number: int, version: str, now: float) -> None:
        """A job has opened the files: are they known?"""
        load = self._loads[number]
        load.version = version
        pack = self._memory.of_version(load.binding.scope, version)
        leaders = (one for one in self._loads.values() if load.may_follow(one))
        if pack is not None:
            self._succeed(load, pack, pack.info, now, was_read=False)
        elif (leader := next(leaders, None)) is not None:
            # The same files are being read already: their load ends both.
            self._stop_job(load)
            load.leader = leader
            leader.followers.append(load)

    def checked(
        self, number: int, contents: msg.Contents, blocks: NDArray[np.int64], now: float
    ) -> None:
        """A job has checked the files, and asks where to pack to."""
        load = self._loads[number]
        load.contents, load.blocks = contents, blocks
        if load.keep():
            self._room.ask(load)
            self.queue.wait_for_room(number, now)
            self.give_room(now)
            return
        allocation = None
        with contextlib.suppress(OSError):
            allocation = self._room.free_now(load)
        self._place(load, allocation)

    def done(
        self, number: int, digest: str, nbytes: int, now: float, parts: tuple[str, ...] = ()
    ) -> None:
        """A job has packed the files, or checked them only."""
        load = self._loads[number]
        scope, allocation = load.binding.scope, load.allocation
        pack = self._memory.of_digest(scope, digest)
        if pack is None:
            info = load.info(digest, nbytes, parts)
            if allocation is None:
                self._succeed(load, None, info, now, was_read=True)
                return
            load.allocation = None
            pack = self._memory.add(scope, info, allocation)
        self._succeed(load, pack, pack.info, now, was_read=True)

    def failed(self, number: int, failure: Failure, now: float) -> None:
        """A job has said what is wrong, or has ended without a word."""
        load = self._loads.get(number)
        if load is not None:
            self._fail(load, failure, now)

    def gone(self, number: int, failure: Failure, now: float) -> None:
        """A job cannot write any more; `failure` says how it ended if it has given no answer."""
        load = self._loads.get(number)
        if load is not None and load.job and not self._begins_anew(load, failure):
            self._fail(load, failure, now)
        allocation = self._dying.pop(number, None)
        if allocation is not None:
            self._memory.give_back(allocation)
            self.give_room(now)

    def add(
        self,
        binding: Binding,
        path: str,
        owners: Sequence[Owner],
        client: Client,
        tickets: list[Ticket],
    ) -> Load:
        assert client.settings is not None
        number = next(self._numbers)
        load = Load(
            number, binding, path, list(owners), client.layouts, client.settings, list(tickets)
        )
        self._loads[number] = load
        self._by_adapter[binding, path] = load
        purpose = Purpose.REQUEST if load.keep() else Purpose.REGISTRATION
        self.queue.add(number, binding.server, owners, purpose, client.settings.timeout_s)
        return load

    def share(self, load: Load, owners: Iterable[Owner]) -> None:
        """Others wait for a load too: it may take their turns."""
        for owner in owners:
            if owner not in load.owners:
                load.owners.append(owner)
                self.queue.share(load.number, owner)

    def _again(self, load: Load, tickets: list[Ticket], *, is_anew: bool = False) -> None:
        """Queues wants anew that the end of a load does not answer."""
        if tickets:
            client = self._clients[tickets[0].client]
            again = self.add(load.binding, load.path, load.owners, client, tickets)
            again.tenant, again.is_anew = load.tenant, is_anew
            for ticket in tickets:
                self._clients[ticket.client].loads[ticket.number] = again

    def _begins_anew(self, leader: Load, failure: Failure) -> bool:
        """Whether files are read once more, with room from others, that there was no memory for.

        The system, or a container, has less than the budget allows: it has ended the packing job.
        Others leave when the files have been checked, for what somebody then wants in memory.
        """
        allocation = leader.allocation
        if failure.kind is not FailureKind.NO_MEMORY or allocation is None or leader.is_anew:
            return False
        if leader.keep() and not self._memory.may_vacate(allocation.held_bytes):
            return False
        family = leader.family()
        for load in family:
            self._end(load)
        for load in family:
            self._again(load, load.tickets + load.later, is_anew=True)
        return True

    def _place(self, load: Load, allocation: Allocation | None) -> None:
        load.allocation = allocation
        if allocation is None:
            self._effects.tell(load.number, CheckOnly(), ())
            return
        extents = [
            (allocation.segments.index(extent.segment), extent.offset, extent.size)
            for extent in allocation.extents
        ]
        places = allocation.places.tobytes()
        self._effects.tell(load.number, Place(places, extents), allocation.segments)

    def give_room(self, now: float) -> None:
        """Gives room to the jobs that wait for it, in order, as far as it goes.

        Those that wait in vain fail at once: nobody overtakes them.
        """
        while (hopeless := self._room.in_vain()) is not None:
            waiting, reason = hopeless
            self._fail(waiting, Failure(FailureKind.NO_MEMORY, reason, []), now)
        while (load := self._room.next()) is not None:
            try:
                allocation = self._room.take(load, self._loads.values())
            except OSError as error:
                message = f"the system gives no memory for the adapter: {error}"
                self._fail(load, Failure(FailureKind.NO_MEMORY, message, []), now)
                continue
            if allocation is None:
                return
            self.queue.go_on(load.number, now)
            self._place(load, allocation)

    def _succeed(
        self, leader: Load, pack: Pack | None, info: msg.PackInfo, now: float, *, was_read: bool
    ) -> None:
        again: list[tuple[Load, list[Ticket]]] = []
        # Read for one of a server's engines: their counts add up.
        reader = leader.tickets[0].client if was_read and leader.tickets else None
        if pack is not None:
            self._memory.lease(info.pack)  # it must not leave between one binding and the next
        for load in leader.family():
            self._end(load)
            if pack is not None and load.is_awaited:
                self._memory.bind(pack, load.binding, load.path, leader.version)
            for ticket in load.tickets:
                if pack is not None or not ticket.keep:
                    read = load is leader and ticket.client == reader
                    self.answer_loaded(ticket, info, now, was_read=read)
            unserved = [ticket for ticket in load.tickets if pack is None and ticket.keep]
            again.append((load, unserved + load.later))
        if pack is not None:
            self._memory.own(pack, leader.whose())
            self._memory.release(info.pack)
        for load, tickets in again:
            self._again(load, tickets)
        self.give_room(now)

    def _fail(self, leader: Load, failure: Failure, now: float) -> None:
        for load in leader.family():
            self._end(load)
            if load.is_awaited:
                self.failures.remember(load.binding, load.path, failure, now)
            for ticket in load.tickets:
                self.answer_failed(ticket, failure)
        for load in leader.family():
            self._again(load, load.later)
        self.give_room(now)

    def end_if_unwanted(self, load: Load, now: float) -> None:
        """Some do not wait for a load any more: perhaps nobody does, or registrations alone."""
        leader = load.leader or load
        if leader.number not in self._loads:
            return
        if not leader.requested():
            for one in leader.family():
                self._end(one)
        elif not leader.keep() and self._room.leave(leader):
            self.queue.go_on(leader.number, now)
            self._place(leader, None)
        self.give_room(now)

    def _end(self, load: Load) -> None:
        del self._loads[load.number]
        self._leave_adapter(load)
        self._room.leave(load)
        if load.job:
            self._stop_job(load)
        else:
            self.queue.remove(load.number)

    def _leave_adapter(self, load: Load) -> None:
        if self._by_adapter.get((load.binding, load.path)) is load:
            del self._by_adapter[load.binding, load.path]

    def _stop_job(self, load: Load) -> None:
        """Kills a load's job; its room stays taken until it is gone: it may still be writing."""
        load.job = False
        self.queue.remove(load.number)
        self._dying[load.number] = load.allocation
        self._effects.kill(load.number)


class RecentFailures:
    """The last failure of each adapter, until its time is over."""

    def __init__(self) -> None:
        self._failures: OrderedDict[Binding, tuple[str, float, Failure]] = OrderedDict()

    def remember(self, binding: Binding, path: str, failure: Failure, now: float) -> None:
        self._failures.pop(binding, None)
        self._failures[binding] = path, now + RETRY_AFTER_S, failure
        if len(self._failures) > MAX_FAILURES:
            self._failures.popitem(last=False)

    def find(self, binding: Binding, path: str, now: float) -> Failure | None:
        """The failure that answers a load request of this adapter now."""
        known = self._failures.get(binding)
        if known is None:
            return None
        failed_path, until, failure = known
        return failure if failed_path == path and now < until else None

    def forget(self, server: str, adapter: int | None = None) -> None:
        """Nothing is known of a server's adapter any more; None: of any of them."""
        for binding in list(self._failures):
            if binding.server == server and adapter in (None, binding.adapter):
                del self._failures[binding]
