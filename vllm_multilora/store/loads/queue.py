"""Which load is next, fairly and not long delayed by those that hang; and who waits for room."""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from vllm_multilora.slots.budget import readable
from vllm_multilora.store.memory.arena import Allocation, pages_of
from vllm_multilora.store.memory.entries import Load
from vllm_multilora.store.memory.held_packs import HostMemory

PATIENCE_S = 2.0
"""Processor time after which a job gives its place to the next one, and goes on beside it."""

IDLE_S = 0.05
"""Seconds without work after which it does so: it waits for its storage, which may hang."""

LONG_IDLE_S = 2.0
"""Seconds without work after which it may be killed for others."""

MAX_OLD_JOBS = 64
"""Jobs that may go on beside those that have a place."""


class Purpose(enum.Enum):
    """Why somebody wants an adapter."""

    REQUEST = "request"
    REGISTRATION = "registration"


@dataclass
class _Job:
    server: str
    deadline: float
    worked: float
    processor_s: float = 0.0
    waiting_since: float | None = None

    def has_place(self, now: float) -> bool:
        """Whether the job keeps another one from starting."""
        return (
            self.waiting_since is None
            and self.processor_s < PATIENCE_S
            and now - self.worked < IDLE_S
        )


@dataclass
class _Waiting:
    purpose: Purpose
    server: str
    owners: list[Hashable]
    timeout_s: float


class LoadQueue:
    """Loads by number: those that wait, and the jobs of those that have been started.

    Each server has a lane of requests and one of registrations. Lanes take turns, in a lane its
    owners, of an owner's loads the oldest is first. A load for which several owners wait is in the
    line of each, and takes whichever turn comes first: nobody waits behind what another one has
    asked for besides. A job keeps its place until it has used `PATIENCE_S` of a processor, and only
    while it works: the next one starts beside it when it has not wanted the processor for `IDLE_S`.
    So loads whose storage hangs hold up others for a moment each. One that wants the processor and
    does not get it works: where the model has all of them, more jobs at once would only take
    longer, all of them. When `MAX_OLD_JOBS` go on without a place and somebody waits, the one that
    has been idle for longest is to be killed.

    While a job waits for room in memory its clock stands still and it has no place; meanwhile no
    further request of its server is started, which would wait for room too, and before what others
    ask for.

    Args:
        places: Jobs that may be young at once.
    """

    def __init__(self, places: int = 2) -> None:
        self.places = places
        # Of lanes, and of each lane's owners, those whose turn comes first are first.
        self._queues: OrderedDict[tuple[Purpose, str], OrderedDict[Hashable, deque[int]]] = (
            OrderedDict()
        )
        self._where: dict[int, _Waiting] = {}
        self._jobs: dict[int, _Job] = {}

    @property
    def queued(self) -> int:
        """Loads that have not been started."""
        return len(self._where)

    def add(
        self,
        number: int,
        server: str,
        owners: Iterable[Hashable],
        purpose: Purpose,
        timeout_s: float,
    ) -> None:
        """Puts a load at the end of its owners' lines; its job may work for so many seconds."""
        self._where[number] = _Waiting(purpose, server, [], timeout_s)
        for owner in owners:
            self.share(number, owner)

    def share(self, number: int, owner: Hashable) -> None:
        """Another owner waits for a load; one that has been started needs no turn any more."""
        where = self._where.get(number)
        if where is not None:
            where.owners.append(owner)
            purpose = self._queues.setdefault((where.purpose, where.server), OrderedDict())
            purpose.setdefault(owner, deque()).append(number)

    def promote(self, number: int) -> None:
        """A request has come to wait for a load that was queued for a registration."""
        where = self._where[number]
        if where.purpose is not Purpose.REQUEST:
            self.remove(number)
            self.add(number, where.server, where.owners, Purpose.REQUEST, where.timeout_s)

    def remove(self, number: int) -> None:
        """Nobody wants the load any more, or its job has ended."""
        self._jobs.pop(number, None)
        where = self._where.pop(number, None)
        if where is None:
            return
        purpose = self._queues[where.purpose, where.server]
        for owner in where.owners:
            purpose[owner].remove(number)
            if not purpose[owner]:
                del purpose[owner]
        if not purpose:
            del self._queues[where.purpose, where.server]

    def start_next(self, now: float) -> int | None:
        """Takes the next load that may be started now, and gives its job a place."""
        placed = sum(job.has_place(now) for job in self._jobs.values())
        if placed >= self.places or len(self._old(now)) >= MAX_OLD_JOBS:
            return None
        for (purpose, server), owners in self._queues.items():
            if purpose is Purpose.REQUEST and self.waits_for_room(server):
                continue
            owner, line = next(iter(owners.items()))
            number = line[0]
            timeout_s = self._where[number].timeout_s
            self.remove(number)
            if owner in owners:
                owners.move_to_end(owner)
            if owners:
                self._queues.move_to_end((purpose, server))
            self._jobs[number] = _Job(server, now + timeout_s, now)
            return number
        return None

    def waits_for_room(self, server: str) -> bool:
        """Whether a job of a server waits for room in memory."""
        return any(
            job.server == server and job.waiting_since is not None for job in self._jobs.values()
        )

    def wait_for_room(self, number: int, now: float) -> None:
        """Stops a job's clock."""
        self._jobs[number].waiting_since = now

    def go_on(self, number: int, now: float) -> None:
        """Starts a job's clock again."""
        job = self._jobs[number]
        assert job.waiting_since is not None
        job.deadline += now - job.waiting_since
        job.worked = now
        job.waiting_since = None

    def looked_at(self, number: int, processor_s: float, now: float, *, is_ready: bool) -> None:
        """Notes how much processor time a job has used so far, and whether it wants more."""
        job = self._jobs[number]
        if is_ready or processor_s != job.processor_s:
            job.processor_s = processor_s
            job.worked = now

    def stood_still(self, seconds: float) -> None:
        """Nobody has heard the jobs for so long, as when the store was frozen."""
        for job in self._jobs.values():
            job.deadline += seconds
            job.worked += seconds

    def overdue(self, now: float) -> list[int]:
        """Jobs to kill: past their deadline, or idle for longest of too many."""
        late = [
            number
            for number, job in self._jobs.items()
            if job.waiting_since is None and now >= job.deadline
        ]
        old = self._old(now)
        if self._where and not late and len(old) >= MAX_OLD_JOBS:
            number = min(old, key=lambda number: self._jobs[number].worked)
            if now - self._jobs[number].worked >= LONG_IDLE_S:
                late.append(number)
        return late

    def next_event(self, now: float) -> float | None:
        """When to look at the jobs again, and ask again, if nothing else happens."""
        working = [job for job in self._jobs.values() if job.waiting_since is None]
        if working and self._where:
            return now + IDLE_S
        return min((job.deadline for job in working), default=None)

    def _old(self, now: float) -> list[int]:
        working = ((n, job) for n, job in self._jobs.items() if job.waiting_since is None)
        return [number for number, job in working if not job.has_place(now)]


class Room:
    """Who waits for room, in the order in which they asked; nobody overtakes."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._waiting: deque[Load] = deque()

    def in_vain(self) -> tuple[Load, str] | None:
        """A load that waits for more than there can be, and why; None: all may get theirs.

        There can be less than when it asked: the server with the largest budget may have gone.
        """
        for load in self._waiting:
            assert load.blocks is not None
            nbytes, budget = pages_of(load.blocks), self._memory.arena.budget
            if not self._memory.fits(1, nbytes):
                assert budget is not None, "each budget has bytes, if one adapter is too large"
                return load, (
                    f"the adapter takes {readable(nbytes)} of host memory, and all adapters "
                    f"together may take {readable(budget)}; raise the budget, or lower the "
                    "adapter's rank"
                )
        return None

    def free_now(self, load: Load) -> Allocation | None:
        """Room that nobody has to leave for, and nobody waits for, if there is memory for it."""
        assert load.blocks is not None
        if self._waiting or load.is_anew:
            return None
        return self._memory.room(load.blocks, evict=False)

    def ask(self, load: Load) -> None:
        """Stands in line."""
        self._waiting.append(load)

    def next(self) -> Load | None:
        """The first in line."""
        return self._waiting[0] if self._waiting else None

    def take(self, load: Load, loads: Iterable[Load]) -> Allocation | None:
        """Room for the first in line, for which others may leave; None: it waits on.

        What its tenant may not keep beside it, and beside all loads of it that have room, leaves
        first.
        """
        assert load.blocks is not None
        scope = load.binding.scope
        if (tenant := load.whose()) is not None:
            coming = sum(
                1
                for one in loads
                if one.allocation is not None
                and (one.whose(), one.binding.scope) == (tenant, scope)
            )
            self._memory.keep_within(scope, tenant, coming + 1)
        allocation = self._memory.room(load.blocks, evict=True)
        if allocation is not None:
            self._waiting.popleft()
            if load.is_anew:
                self._memory.vacate(allocation.held_bytes)
        return allocation

    def leave(self, load: Load) -> bool:
        """The load needs no room any more; whether it has waited for it."""
        if load not in self._waiting:
            return False
        self._waiting.remove(load)
        return True
