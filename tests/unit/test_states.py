"""The one state machine of adapters."""

import pytest

from vllm_multilora.states import (
    TRANSITIONS,
    AdapterState,
    IllegalTransitionError,
    require_transition,
)


def reachable(start: AdapterState) -> set[AdapterState]:
    found, new = set(), {start}
    while new:
        found |= new
        new = {after for state in new for after in TRANSITIONS[state]} - found
    return found


@pytest.mark.parametrize("state", AdapterState)
def test_every_state_is_reached_from_absent_and_leads_back(state):
    assert state in reachable(AdapterState.ABSENT)
    assert AdapterState.ABSENT in reachable(state)


def test_a_quarantined_adapter_serves_nobody_until_it_is_withdrawn():
    assert TRANSITIONS[AdapterState.QUARANTINED] == {AdapterState.ABSENT}


def test_files_are_read_before_weights_are_in_a_slot():
    before = {state for state, after in TRANSITIONS.items() if AdapterState.SLOT in after}
    assert before == {AdapterState.HOST}


def test_an_illegal_transition_says_what_was_found_and_expected():
    require_transition(7, AdapterState.HOST, AdapterState.SLOT)
    with pytest.raises(
        IllegalTransitionError,
        match="adapter 7 cannot become slot: its state is queued, expected host",
    ):
        require_transition(7, AdapterState.QUEUED, AdapterState.SLOT)
