"""What policies are told: every use once, nothing about adapters outside their tier."""

import pytest

from tests.cache.caches import load, make_cache
from vllm_multilora.cache import CachePolicy, PolicyError


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


@pytest.fixture
def journals():
    """A cache of two slots with adapters 1, 2 and 3 in host memory, and both tiers' journals."""
    made = []

    def policy():
        made.append(Journal())
        return made[-1]

    cache = make_cache(slots=2, loaded=[1, 2, 3], policy=policy)
    gpu, cpu = made
    gpu.take(), cpu.take()
    return cache, gpu, cpu


def test_a_step_is_reported_before_its_victims_are_chosen(journals):
    cache, gpu, cpu = journals
    cache.begin_step([1, 2])
    assert gpu.take() == [("added", 1, 1), ("added", 2, 1), ("used", [1, 2], [1, 2])]
    assert cpu.take() == [("used", [1, 2], [1, 2])]
    cache.begin_step([3, 1])
    assert gpu.take() == [
        ("used", [1], []),
        ("victim", [2]),
        ("removed", 2),
        ("added", 3, 1),
        ("used", [3], [3]),
    ]
    assert cpu.take() == [("used", [1, 3], [3])]


def test_the_same_step_again_is_no_new_use(journals):
    cache, gpu, cpu = journals
    cache.begin_step([1, 2])
    gpu.take(), cpu.take()
    cache.begin_step({2, 1})
    cache.end_step()
    cache.begin_step([1, 2])
    assert gpu.take() == cpu.take() == []


def test_an_announced_step_is_reported_once(journals):
    cache, gpu, cpu = journals
    cache.register(4)
    assert cache.protect_step([1, 4]) == (4,)
    load(cache, 4)
    cache.begin_step([1, 4])
    assert [call for call in cpu.take() if call[0] == "used"] == [
        ("used", [1], [1]),
        ("used", [4], [4]),
    ]
    assert [call for call in gpu.take() if call[0] == "used"] == [("used", [1, 4], [1, 4])]


def test_sizes_are_bytes_in_host_memory_and_one_in_slots(journals):
    cache, gpu, cpu = journals
    load(cache, 5, size=777)
    cache.begin_step([5])
    assert ("added", 5, 777) in cpu.take()
    assert ("added", 5, 1) in gpu.take()


def test_adapters_whose_slots_were_cleared_are_reported_again_with_their_new_slots(journals):
    cache, gpu, cpu = journals
    cache.begin_step([1])
    gpu.take(), cpu.take()
    cache.clear_slots()
    cache.begin_step([1])
    assert gpu.take() == [("removed", 1), ("added", 1, 1), ("used", [1], [1])]
    assert cpu.take() == []


class Stubborn(Journal):
    def victim(self, candidates):
        return 99


def test_a_policy_that_chooses_no_candidate_is_named():
    cache = make_cache(slots=1, adapters=2, loaded=[1, 2], policy=Stubborn)
    cache.begin_step([1])
    message = "policy Stubborn chose 99 as victim; it must choose one of the candidates"
    with pytest.raises(PolicyError, match=message):
        cache.begin_step([2])
    assert cache.slots == (1,)
    cache.register(3)
    cache.start_loading(3)
    with pytest.raises(PolicyError, match=message):
        cache.finish_loading(3, 1, evict=True)
    assert cache.state(3).value == "disk"
