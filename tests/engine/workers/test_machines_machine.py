"""Stores of two machines that load, refuse, evict and die in any order, beneath `MachineStores`."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.engine.fake_engine import FakeStore, pack_info
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.workers.machines import MachineStores
from vllm_multilora.store.protocol.messages import (
    Evicted,
    Failed,
    Forgotten,
    Loaded,
    LoadRequest,
    Restarted,
)

MACHINES = 2
ADAPTERS = st.integers(1, 2)
ROOM = 1  # adapters that each machine can hold on lease at once
WHICH = st.integers(0, MACHINES - 1)


class Part(FakeStore):
    """A machine's store: what it holds, and the numbers that it gives."""

    def __init__(self, machine: int) -> None:
        super().__init__()
        self.packs = 1000 * (1 + machine)
        self.resident: dict[int, int] = {}
        self.answered: dict[int, LoadRequest] = {}

    def answerable(self) -> list[int]:
        """The wants that have room: it is not taken by leases on other adapters."""
        leased = {adapter for adapter, pack in self.resident.items() if self.leases[pack]}
        return sorted(
            ticket
            for ticket, load_request in self.load_requests.items()
            if not load_request.keep or len(leased | {load_request.adapter}) <= ROOM
        )

    def answer(self, ticket: int) -> None:
        load_request = self.answered[ticket] = self.load_requests.pop(ticket)
        for adapter, pack in list(self.resident.items()):
            if load_request.keep and adapter != load_request.adapter and not self.leases[pack]:
                del self.resident[adapter]
                self.evict(pack)
        if load_request.adapter not in self.resident:
            self.packs += 1
            self.resident[load_request.adapter] = self.packs
        pack = self.resident[load_request.adapter]
        self.leases[pack] += load_request.keep
        info = pack_info(pack, f"adapter {load_request.adapter}")
        self.inbox.append(Loaded(ticket, info, 0.1, True, load_request.keep))

    def restart(self) -> None:
        # As `StoreClient` does: what was not taken in is wanted from the new store again.
        lost = [m for m in self.inbox if isinstance(m, Loaded)]
        super().restart()
        self.resident.clear()
        for message in lost:
            self.load_requests[message.ticket] = self.answered[message.ticket]


class Machines(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.parts = [Part(machine) for machine in range(MACHINES)]
        self.stores = MachineStores(self.parts)
        self.asked: dict[int, bool] = {}  # tickets without an answer, and whether with a lease
        self.held: Counter[int] = Counter()
        self.known: set[int] = set()
        self.leaving = 0

    # What the engine core does

    @rule(adapter=ADAPTERS, keep=st.booleans())
    def request_load(self, adapter, keep):
        self.asked[self.stores.request_load(LoadRequest(adapter, "a", "/a", keep=keep))] = keep

    @precondition(lambda self: len(self.asked) > 2)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.asked)))
        del self.asked[ticket]
        self.stores.cancel(ticket)

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def release(self, data):
        pack = data.draw(st.sampled_from(sorted(+self.held)))
        self.held[pack] -= 1
        self.stores.release(pack)

    @rule(adapter=ADAPTERS)
    def forget(self, adapter):
        self.stores.forget(adapter)
        self.leaving += 1

    @rule()
    def poll(self):
        for message in self.stores.poll():
            match message:
                case Loaded(ticket):
                    assert message.leased == self.asked.pop(ticket)
                    if message.leased:
                        assert self.stores.elsewhere(message.pack.pack)
                        self.held[message.pack.pack] += 1
                    if message.pack.pack:
                        self.known.add(message.pack.pack)
                case Failed(ticket):
                    del self.asked[ticket]
                case Evicted(pack):
                    assert pack in self.known
                    self.known.remove(pack)
                case Forgotten():
                    self.leaving -= 1
                    assert self.leaving >= 0
                case Restarted():
                    self.known.clear()
                    self.leaving = 0

        # All that has happened is known now.
        for pack in self.known:
            for part, info in zip(self.parts[1:], self.stores.elsewhere(pack), strict=True):
                assert info.pack in part.resident.values()

    # What stores do

    @rule(machine=WHICH, data=st.data(), is_heard=st.booleans())
    def answer(self, machine, data, is_heard):
        part = self.parts[machine]
        if tickets := part.answerable():
            part.answer(data.draw(st.sampled_from(tickets)))
        if is_heard:
            self.poll()

    @rule(machine=WHICH, is_bad=st.integers(0, 3), data=st.data())
    def fail(self, machine, is_bad, data):
        part = self.parts[machine]
        if part.load_requests and is_bad == 1:
            load_request = part.load_requests.pop(
                data.draw(st.sampled_from(sorted(part.load_requests)))
            )
            part.inbox.append(Failed(load_request.ticket, FailureKind.GONE, "gone", []))

    @rule(machine=WHICH, adapter=ADAPTERS)
    def evict(self, machine, adapter):
        part = self.parts[machine]
        pack = part.resident.get(adapter)
        if pack is not None and not part.leases[pack]:
            del part.resident[adapter]
            part.evict(pack)

    @rule(machine=WHICH)
    def forgets(self, machine):
        self.parts[machine].forgets()

    @rule(machine=WHICH, is_heard=st.booleans())
    def restart(self, machine, is_heard):
        self.parts[machine].restart()
        if is_heard:
            self.poll()

    @invariant()
    def nobody_copies_from_what_has_no_lease(self):
        for pack in +self.held:
            for part, info in zip(self.parts[1:], self.stores.elsewhere(pack), strict=True):
                still_there = info.pack in part.resident.values()
                assert not still_there or part.leases[info.pack] > 0

    def teardown(self):
        """In the end every load request has its answer, and every lease has been given back."""
        for _ in range(10 + 10 * len(self.asked)):
            for part in self.parts:
                for ticket in part.answerable()[:1]:
                    part.answer(ticket)
                part.forgets()
            self.poll()
            for pack in list(self.held.elements()):
                self.stores.release(pack)
            self.held.clear()
        assert not self.asked
        assert not self.leaving
        assert [part.leased for part in self.parts] == [{}, {}]


TestMachines = Machines.TestCase
TestMachines.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
