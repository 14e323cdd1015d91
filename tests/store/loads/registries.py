"""A registry whose clients and jobs are played by the test."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np

from tests.store.fake_reader import digest_of
from tests.store.memory.test_arena import FakeSegments
from vllm_multilora.failures import FailureKind
from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.store.loads.registry import Registry
from vllm_multilora.store.memory.arena import Arena
from vllm_multilora.store.memory.entries import Client
from vllm_multilora.store.memory.held_packs import HostMemory
from vllm_multilora.store.protocol.job_messages import Failure, Place
from vllm_multilora.store.protocol.messages import (
    Contents,
    Evicted,
    Failed,
    Loaded,
    LoadRequest,
    StoreSettings,
)

PAGE = 4096
CONTENTS = Contents(8, has_special=False, invocation_tokens=(), dora=False)


class Watched(LruPolicy):
    """Is told of what is in memory, and asked about what may leave, and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.members: set[int] = set()
        self.steps: list[tuple[list[int], list[int]]] = []

    def added(self, adapter_id, size, cost):
        assert adapter_id not in self.members
        self.members.add(adapter_id)
        super().added(adapter_id, size, cost)

    def used(self, adapter_ids, joined):
        assert set(joined) <= set(adapter_ids) <= self.members
        self.steps.append((list(adapter_ids), list(joined)))
        super().used(adapter_ids, joined)

    def removed(self, adapter_id):
        self.members.remove(adapter_id)
        super().removed(adapter_id)

    def victim(self, candidates):
        assert set(candidates) <= self.members
        return super().victim(candidates)


class World:
    """Plays everything around a registry, and takes note."""

    def __init__(self, settings: StoreSettings | None = None, first_pack: int = 1000) -> None:
        self.settings = settings or StoreSettings(budget_bytes=10 * PAGE)
        arena, numbers = Arena(FakeSegments(), None), itertools.count(first_pack)
        self.policy = Watched()
        self.memory = HostMemory(arena, self.policy, numbers)
        self.registry = Registry(self.memory, self)
        self.now = 0.0
        self.said: dict[int, list] = {}
        self.jobs: dict[int, str] = {}  # what each living job waits for
        self.loads: dict[int, object] = {}
        self.dying: set[int] = set()
        self.read: Counter[str] = Counter()
        self.refuse: str | None = None
        self.tickets = 0

    # Effects

    def send(self, client, message):
        self.said[client].append(message)
        if isinstance(message, Evicted):
            pack = message.pack
            assert not any(c.leases[pack] for c in self.registry.clients.values())

    def start(self, load):
        self.jobs[load.number] = "opening"
        self.loads[load.number] = load

    def tell(self, job, message, segments):
        assert self.jobs[job] == "checked"
        assert isinstance(message, Place) == (self.loads[job].allocation is not None)
        self.jobs[job] = "reading"

    def kill(self, job):
        if job in self.jobs:
            del self.jobs[job]
            self.dying.add(job)

    def refusal(self, path):
        return self.refuse

    # Clients

    def client(self, number: int, server: str = "server", model: str = "model", **settings) -> int:
        self.registry.clients[number] = Client(number, "engine", server, 1)
        self.said[number] = []
        chosen = StoreSettings(**settings) if settings else self.settings
        self.registry.configure(number, model, [], chosen, self.now)
        return number

    def request_load(
        self, client: int, adapter: int = 1, path: str | None = None, **options
    ) -> int:
        self.tickets += 1
        path = path or f"/adapters/{adapter}"
        load_request = LoadRequest(
            adapter, f"adapter {adapter}", path, ticket=self.tickets, **options
        )
        self.registry.request_load(client, load_request, self.now)
        self.registry.loads.tick(self.now)
        return self.tickets

    def answers(self, client: int, ticket: int) -> list:
        return [
            m for m in self.said[client] if isinstance(m, Loaded | Failed) and m.ticket == ticket
        ]

    def answer(self, client: int, ticket: int):
        (found,) = self.answers(client, ticket)
        return found

    # Jobs

    def opened(self, job: int, version: str | None = None) -> None:
        self.jobs[job] = "checking"
        version = self.loads[job].path if version is None else version
        self.registry.loads.opened(job, version, self.now)

    def checked(self, job: int, pages: int = 1) -> None:
        self.jobs[job] = "checked"
        blocks = np.full(pages, PAGE, np.int64)
        self.registry.loads.checked(job, CONTENTS, blocks, self.now)

    def done(self, job: int, digest: str | None = None) -> None:
        path = self.loads[job].path
        self.read[path] += 1
        self.registry.loads.done(job, digest_of(digest or path), 64, self.now)

    def failed(self, job: int, kind: FailureKind = FailureKind.INVALID) -> None:
        self.registry.loads.failed(job, Failure(kind, "it is broken", []), self.now)

    def gone(self, job: int, kind: FailureKind = FailureKind.INTERNAL) -> None:
        self.jobs.pop(job, None)
        self.dying.discard(job)
        failure = Failure(kind, "it crashed", [])
        self.registry.loads.gone(job, failure, self.now)
        self.registry.loads.tick(self.now)

    def open_all(self, version: str | None = None) -> None:
        for job in list(self.jobs):
            self.opened(job, version)

    def read_one(self, version: str, digest: str | None = None) -> None:
        """The only job finds this version of its files, and reads them."""
        (job,) = self.jobs
        self.opened(job, version)
        self.checked(job)
        self.done(job, digest)

    def fail_one(self) -> None:
        """The first job finds something wrong with its files, and ends."""
        self.failed(next(iter(self.jobs)))
        self.settle()

    def step(self, job: int, pages: int = 1) -> None:
        """Takes a job one step on; one that waits for the store stays where it is."""
        match self.jobs[job]:
            case "opening":
                self.opened(job)
            case "checking":
                self.checked(job, pages)
            case "reading":
                self.done(job)

    def settle(self, pages: int = 1) -> None:
        """Lets all jobs work until nothing moves any more."""
        for _ in range(1000):
            before = (dict(self.jobs), set(self.dying), self.registry.loads.queue.queued)
            for job in list(self.jobs):
                if job in self.jobs:
                    self.step(job, pages)
            for job in list(self.dying):
                self.gone(job)
            self.registry.loads.tick(self.now)
            if before == (self.jobs, self.dying, self.registry.loads.queue.queued):
                return
        raise AssertionError("it does not settle")

    def load(self, client: int, adapter: int = 1, pages: int = 1, **options):
        """Requests an adapter and lets it come."""
        ticket = self.request_load(client, adapter, **options)
        self.settle(pages)
        return self.answer(client, ticket)

    def evicted(self, client: int) -> Iterator[int]:
        return (m.pack for m in self.said[client] if isinstance(m, Evicted))

    def check(self) -> None:
        """What is true at any time."""
        memory, totals = self.memory, self.memory.totals()
        packs = sum(p.allocation.held_bytes for p in memory.packs.values())
        loads = self.registry.loads._loads.values()
        allocations = [one.allocation for one in loads if one.allocation]
        allocations += [one for one in self.registry.loads._dying.values() if one]
        assert memory.staged == len(allocations)
        assert all((one.leader or one).requested() for one in loads), "a load that nobody waits for"
        assert all(len(one.owners) == len(set(one.owners)) for one in loads)
        assert self.registry.loads._dying.keys() == self.dying
        assert totals.bytes == packs + sum(one.held_bytes for one in allocations)
        if memory.policy is self.policy:
            assert self.policy.members == memory.packs.keys()
        alike = list(memory._bindings_of.values())
        assert all(alike), "a number is noted that means nothing"
        assert set().union(*alike) == memory._bound.keys()
        for load in self.registry.loads._room._waiting:
            assert load.keep(), "nobody wants what waits for room in memory"
        leases = Counter()
        for client in self.registry.clients.values():
            leases.update(client.leases)
        for number, pack in memory.packs.items():
            assert pack.leases == leases[number]
            assert pack.leases or pack.bindings, "a pack that nobody needs"
        assert set(leases) <= set(memory.packs), "a lease on a pack that has left"
        for client in self.registry.clients.values():
            for ticket, load in client.loads.items():
                assert load in loads
                numbers = [(t.client, t.number) for t in (*load.tickets, *load.later)]
                assert numbers.count((client.number, ticket)) == 1
