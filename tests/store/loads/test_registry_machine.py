"""Whatever clients and jobs do, in whatever order: no want is lost, nothing leaves on lease."""

import random
from collections import defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.store.loads.registries import PAGE, World
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.protocol.messages import Loaded

ADAPTERS = st.integers(1, 5)
KINDS = (FailureKind.INTERNAL, FailureKind.NO_MEMORY)
LIMITS = {None: None, "acme": 1, "umbrella": 2}
TENANTS = st.sampled_from(list(LIMITS))


class RegistryMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(2, 8), count=st.sampled_from([None, 2, 4]))
    def begin(self, pages, count):
        self.budget, self.count = pages * PAGE, count
        self.world = World()
        self.open: dict[int, int] = {}  # client of each ticket that waits for an answer
        self.cancelled: set[int] = set()
        self.connected: list[int] = []
        self.next_client = 1
        self.arrive(False, 0)

    @rule(other=st.booleans(), less=st.integers(0, 6))
    def arrive(self, other, less):
        if len(self.connected) < 3:
            number = self.world.client(
                self.next_client,
                "other" if other else "server",
                budget_bytes=max(PAGE, self.budget - less * PAGE),
                budget_adapters=self.count,
                timeout_s=20.0,
            )
            self.connected.append(number)
            self.next_client += 1

    @precondition(lambda self: len(self.connected) > 2)
    @rule(which=st.integers(0, 2))
    def die(self, which):
        number = self.connected.pop(which % len(self.connected))
        self.world.registry.client_gone(number, self.world.now)
        self.open = {t: c for t, c in self.open.items() if c != number}

    @rule(
        which=st.integers(0, 2),
        adapter=ADAPTERS,
        keep=st.booleans(),
        fresh=st.booleans(),
        tenant=TENANTS,
    )
    def request_load(self, which, adapter, keep, fresh, tenant):
        client = self.connected[which % len(self.connected)]
        # Adapters 4 and 5 are in one folder: they are the same files.
        path = f"/adapters/{min(adapter, 4)}"
        options = {"owners": (tenant,), "most": LIMITS[tenant]} if tenant else {}
        ticket = self.world.request_load(client, adapter, path, keep=keep, fresh=fresh, **options)
        self.open[ticket] = client

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        ticket = sorted(self.open)[which % len(self.open)]
        client = self.open.pop(ticket)
        if not self.world.answers(client, ticket):
            self.cancelled.add(ticket)
        self.world.registry.cancel(client, ticket, self.world.now)

    @rule(which=st.integers(0, 20))
    def release(self, which):
        for client in self.world.registry.clients.values():
            if client.leases:
                packs = sorted(client.leases)
                self.world.registry.release(client.number, packs[which % len(packs)], 0.0)
                return

    @rule(adapter=ADAPTERS, which=st.integers(0, 2), keep=st.booleans(), pages=st.integers(1, 4))
    def load(self, adapter, which, keep, pages):
        self.request_load(which, adapter, keep, False, None)
        self.world.settle(pages)

    @rule(pages=st.integers(1, 4))
    def settle(self, pages):
        self.world.settle(pages)

    @precondition(lambda self: len(self.world.memory.packs) > 1)
    @rule(adapter=ADAPTERS, which=st.integers(0, 2))
    def forget(self, adapter, which):
        client = self.connected[which % len(self.connected)]
        self.world.registry.forget(client, adapter, self.world.now)

    @precondition(lambda self: self.world.jobs)
    @rule(which=st.integers(0, 20), pages=st.integers(1, 4), count=st.integers(1, 3))
    def step(self, which, pages, count):
        jobs = sorted(self.world.jobs)
        for _ in range(count):
            if (job := jobs[which % len(jobs)]) in self.world.jobs:
                self.world.step(job, pages)

    @precondition(lambda self: "reading" in self.world.jobs.values())
    @rule(which=st.integers(0, 20), crash=st.booleans(), kind=st.sampled_from(KINDS))
    def break_job(self, which, crash, kind):
        jobs = sorted(self.world.jobs)
        (self.world.gone if crash else self.world.failed)(jobs[which % len(jobs)], kind)

    @precondition(lambda self: self.world.dying)
    @rule(which=st.integers(0, 20))
    def end(self, which):
        dying = sorted(self.world.dying)
        self.world.gone(dying[which % len(dying)])

    @rule(seconds=st.sampled_from([0.05, 0.5, 3.0, 25.0]))
    def pass_time(self, seconds):
        self.world.now += seconds
        self.world.registry.loads.tick(self.world.now)

    @rule(seed=st.integers(0, 9))
    def use(self, seed):
        packs = sorted(self.world.memory.packs)
        chosen = random.Random(seed).sample(packs, min(2, len(packs)))
        self.world.registry.used(self.connected[0], chosen)

    @invariant()
    def all_is_accounted_for(self):
        if not hasattr(self, "world"):
            return
        self.world.check()
        memory = self.world.memory
        assert memory.totals().bytes <= self.budget
        assert self.count is None or len(memory.packs) + memory.staged <= self.count
        for ticket, client in list(self.open.items()):
            answers = self.world.answers(client, ticket)
            assert len(answers) <= 1
            waiting = ticket in self.world.registry.clients[client].loads
            assert waiting != bool(answers), "a want is either waiting or answered"
            if answers:
                del self.open[ticket]
        owned = defaultdict(list)
        for pack in self.world.memory.packs.values():
            owned[pack.tenant].append(pack)
        for owner, packs in owned.items():
            most = owner and LIMITS[owner.of]
            assert most is None or len(packs) <= most or all(pack.leases for pack in packs)
        for messages in self.world.said.values():
            answered = {m.ticket for m in messages if isinstance(m, Loaded)}
            assert not answered & self.cancelled

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for _ in range(20):
            self.world.settle()
            self.world.now += 5.0
            for client in self.world.registry.clients.values():
                for pack, count in list(client.leases.items()):
                    for _ in range(count):
                        self.world.registry.release(client.number, pack, self.world.now)
        self.all_is_accounted_for()
        assert not self.open, "wants that were never answered"
        for client in list(self.connected):
            self.world.registry.client_gone(client, self.world.now)
        self.world.settle()
        assert self.world.memory.totals().bytes == 0
        assert self.world.memory.totals().adapters == 0


RegistryMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None
)
TestRegistryMachine = RegistryMachine.TestCase
