"""What policies are told: every use once, nothing about adapters outside their tier."""

import pytest

from tests.slots.situations import bring, make_slots, run
from vllm_multilora.slots import CachePolicy
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.policies.policy import PolicyError
from vllm_multilora.slots.simulation.host_tier import HostTier


class Journal(CachePolicy):
    """Writes down all calls; its victims are the first candidates."""

    def __init__(self):
        self.calls = []

    def added(self, adapter_id, size, cost):
        self.calls.append(("added", adapter_id, size))

    def used(self, adapter_ids, joined):
        self.calls.append(("used", list(adapter_ids), list(joined)))

    def removed(self, adapter_id):
        self.calls.append(("removed", adapter_id))

    def victim(self, candidates):
        self.calls.append(("victim", list(candidates)))
        return candidates[0]

    def take(self):
        calls, self.calls = self.calls, []
        return calls


def test_a_step_is_reported_before_its_victims_are_chosen():
    gpu = Journal()
    slots = make_slots(2, lambda: gpu)
    run(slots, [1, 2])
    assert gpu.take() == [("added", 1, 1), ("added", 2, 1), ("used", [1, 2], [1, 2])]
    slots.running(frozenset({1}))
    bring(slots, 3)
    slots.running(frozenset({1, 3}))
    assert gpu.take() == [
        ("used", [1], []),
        ("victim", [2]),
        ("removed", 2),
        ("added", 3, 1),
        ("used", [1, 3], [3]),
    ]


def test_candidates_are_in_the_order_of_their_numbers():
    gpu = Journal()
    slots = make_slots(2, lambda: gpu)
    for adapter in (2, 1):
        run(slots, [adapter])
    run(slots, [])
    slots.assign(3, 1)
    assert ("victim", [1, 2]) in gpu.take()


def test_adapters_whose_slots_were_cleared_are_reported_again_with_their_new_slots():
    gpu = Journal()
    slots = make_slots(2, lambda: gpu)
    run(slots, [1])
    gpu.take()
    slots.clear_all()
    run(slots, [1])
    assert gpu.take() == [("removed", 1), ("added", 1, 1), ("used", [1], [1])]


def test_packs_are_reported_with_their_bytes_and_once_a_change_of_the_batches():
    cpu = Journal()
    host = HostTier(cpu, CpuBudget())
    host.take(5, 777)
    host.used([5, 6])
    host.used([6, 5])
    assert cpu.take() == [("added", 5, 777), ("used", [5], [5])]
    host.take(6, 10)
    assert cpu.take() == [("added", 6, 10), ("used", [6], [6])]
    host.used([5])
    host.drop(5)
    assert cpu.take() == [("used", [5], []), ("removed", 5)]


class Stubborn(Journal):
    def victim(self, candidates):
        return 99


def test_a_policy_that_chooses_no_candidate_is_named():
    message = "policy Stubborn chose 99 as victim; it must choose one of the candidates"
    slots = make_slots(1, Stubborn)
    run(slots, [1], [])
    with pytest.raises(PolicyError, match=message):
        slots.assign(2, 1)
    assert slots.contents == (1,)
    host = HostTier(Stubborn(), CpuBudget(adapters=1))
    host.take(1, 10)
    with pytest.raises(PolicyError, match=message):
        host.take(2, 10)
