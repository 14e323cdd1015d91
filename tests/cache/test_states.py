"""The table of states, row by row, through the cache's own methods."""

import pytest

from tests.cache.caches import load, make_cache
from vllm_multilora.cache import AdapterState, IllegalTransitionError
from vllm_multilora.cache.states import TRANSITIONS

A = 1


def bring_to(state: AdapterState):
    cache = make_cache(loaded=[8, 9])
    if state is AdapterState.GONE:
        return cache
    cache.register(A)
    if state in (AdapterState.LOADING, AdapterState.FAILED):
        cache.start_loading(A)
    if state is AdapterState.FAILED:
        cache.fail_loading(A, "no such file")
    if state in (AdapterState.CPU, AdapterState.GPU):
        load(cache, A)
    if state is AdapterState.GPU:
        cache.begin_step([A])
        cache.end_step()
    assert cache.state(A) is state
    return cache


LOADING_STEPS = {
    "start_loading": (lambda cache: cache.start_loading(A), AdapterState.LOADING),
    "finish_loading": (
        lambda cache: cache.finish_loading(A, 1, evict=True),
        AdapterState.CPU,
    ),
    "fail_loading": (lambda cache: cache.fail_loading(A, "torn"), AdapterState.FAILED),
}
LEGAL = {
    (AdapterState.DISK, "start_loading"),
    (AdapterState.FAILED, "start_loading"),
    (AdapterState.LOADING, "finish_loading"),
    (AdapterState.LOADING, "fail_loading"),
}


@pytest.mark.parametrize("name", LOADING_STEPS)
@pytest.mark.parametrize("state", list(AdapterState), ids=lambda state: state.value)
def test_loading_takes_the_steps_of_the_table_and_no_others(state, name):
    cache = bring_to(state)
    step, after = LOADING_STEPS[name]
    if (state, name) in LEGAL:
        step(cache)
        assert cache.state(A) is after
    else:
        with pytest.raises(IllegalTransitionError, match=f"its state is {state.value}, expected"):
            step(cache)
        assert cache.state(A) is state


@pytest.mark.parametrize("state", list(AdapterState), ids=lambda state: state.value)
def test_registering_a_known_adapter_changes_nothing(state):
    cache = bring_to(state)
    cache.register(A)
    assert cache.state(A) is (AdapterState.DISK if state is AdapterState.GONE else state)


@pytest.mark.parametrize(
    "state", [state for state in AdapterState if state is not AdapterState.GONE], ids=str
)
def test_an_adapter_can_be_removed_from_every_state(state):
    cache = bring_to(state)
    before = cache.cpu_bytes
    slot, size = cache.slot_of(A), cache.size(A) or 0
    assert cache.remove(A) == slot
    assert cache.state(A) is AdapterState.GONE
    assert A not in cache.known
    assert A not in cache.slots
    assert cache.cpu_bytes == before - size


def test_the_table_leads_from_every_state_to_every_other():
    for start in AdapterState:
        reached = {start}
        while new := {to for state in reached for to in TRANSITIONS[state]} - reached:
            reached |= new
        assert reached == set(AdapterState)


def test_a_failure_is_remembered_until_the_next_attempt():
    cache = bring_to(AdapterState.FAILED)
    assert cache.failure(A) == "no such file"
    cache.start_loading(A)
    assert cache.failure(A) is None


def test_the_error_says_what_was_expected():
    cache = bring_to(AdapterState.FAILED)
    with pytest.raises(
        IllegalTransitionError,
        match="adapter 1 cannot become cpu: its state is failed, expected loading",
    ):
        cache.finish_loading(A, 1, evict=True)
