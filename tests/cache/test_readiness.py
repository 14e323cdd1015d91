"""From what ranks say to what an engine may conclude."""

import random

import pytest

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.readiness import Readiness, Standing
from vllm_multilora.cache.readiness_events import Failed, Lost, Missed, MissedReason, Ready

GONE = LoadFailure(FailureKind.GONE, "no such folder")
TORN = LoadFailure(FailureKind.INVALID, "torn")
GAP = Missed(MissedReason.OVERFLOW)
A, B = 1, 2


@pytest.fixture
def readiness():
    return Readiness(ranks=2)


def test_an_adapter_is_ready_once_all_ranks_have_said_so(readiness):
    assert readiness.state(A) is Standing.UNKNOWN
    serial = readiness.ask(A)
    assert readiness.state(A) is Standing.LOADING
    assert readiness.update([(0, Ready(A, serial))]) == set()
    assert readiness.update([(0, Ready(A, serial))]) == set()
    assert readiness.state(A) is Standing.LOADING
    assert readiness.update([(1, Ready(A, serial))]) == {A}
    assert readiness.state(A) is Standing.READY
    assert readiness.failure(A) is None


def test_the_first_failure_of_any_rank_counts(readiness):
    serial = readiness.ask(A)
    told = [(0, Ready(A, serial)), (1, Failed(A, serial, GONE)), (0, Failed(A, serial, TORN))]
    assert readiness.update(told) == {A}
    assert readiness.state(A) is Standing.FAILED
    assert readiness.failure(A) == GONE
    assert readiness.update([(1, Ready(A, serial))]) == set()
    assert readiness.state(A) is Standing.FAILED


def test_serial_numbers_ascend_over_all_adapters_and_are_not_used_twice(readiness):
    serials = [readiness.ask(A), readiness.ask(B), readiness.ask(A)]
    readiness.forget(A)
    serials.append(readiness.ask(A))
    assert serials == sorted(set(serials))


@pytest.mark.parametrize("late", [Ready, Failed])
def test_an_answer_to_an_older_request_is_not_taken_for_one_to_the_newer(readiness, late):
    old = readiness.ask(A)
    readiness.forget(A)
    new = readiness.ask(A)
    event = Ready(A, old) if late is Ready else Failed(A, old, TORN)
    readiness.update([(0, event), (1, event)])
    assert readiness.state(A) is Standing.LOADING
    readiness.update([(0, Ready(A, new)), (1, Ready(A, new))])
    assert readiness.state(A) is Standing.READY


def test_asking_after_a_failure_begins_anew(readiness):
    readiness.update([(0, Failed(A, readiness.ask(A), TORN))])
    serial = readiness.ask(A)
    assert readiness.state(A) is Standing.LOADING
    assert readiness.failure(A) is None
    readiness.update([(0, Ready(A, serial)), (1, Ready(A, serial))])
    assert readiness.state(A) is Standing.READY


def test_what_is_said_of_a_forgotten_or_never_asked_adapter_does_not_count(readiness):
    serial = readiness.ask(A)
    readiness.forget(A)
    told = [(0, Ready(A, serial)), (1, Failed(A, serial, TORN)), (0, Lost(A)), (1, Ready(B, 9))]
    assert readiness.update(told) == set()
    assert readiness.state(A) is readiness.state(B) is Standing.UNKNOWN


def test_a_loss_on_one_rank_makes_a_ready_adapter_unknown(readiness):
    serial = readiness.ask(A)
    readiness.update([(0, Ready(A, serial)), (1, Ready(A, serial))])
    assert readiness.update([(1, Lost(A))]) == {A}
    assert readiness.state(A) is Standing.UNKNOWN


def test_a_rank_that_loses_it_before_the_other_is_ready_must_be_asked_again(readiness):
    serial = readiness.ask(A)
    readiness.update([(0, Ready(A, serial)), (0, Lost(A)), (1, Ready(A, serial))])
    assert readiness.state(A) is Standing.UNKNOWN


def test_a_loss_from_before_the_request_does_not_undo_it(readiness):
    serial = readiness.ask(A)
    readiness.update([(0, Lost(A)), (0, Ready(A, serial)), (1, Ready(A, serial))])
    assert readiness.state(A) is Standing.READY


def test_a_failed_adapter_stays_failed_when_a_rank_loses_it(readiness):
    serial = readiness.ask(A)
    readiness.update([(0, Ready(A, serial)), (1, Failed(A, serial, TORN)), (0, Lost(A))])
    assert readiness.failure(A) == TORN


def test_after_a_gap_what_the_rank_had_said_is_to_be_asked_again(readiness):
    for adapter_id in (B, A):
        serial = readiness.ask(adapter_id)
        readiness.update([(0, Ready(adapter_id, serial)), (1, Ready(adapter_id, serial))])
    assert readiness.to_ask_again() == []
    assert readiness.update([(1, GAP)]) == {A, B}
    assert readiness.state(A) is Standing.LOADING
    assert readiness.to_ask_again() == [A, B]
    serial = readiness.ask(A)
    assert readiness.to_ask_again() == [B]
    readiness.update([(0, Ready(A, serial)), (1, Ready(A, serial))])
    assert readiness.state(A) is Standing.READY


def test_an_answer_after_the_gap_makes_the_rank_certain_again(readiness):
    serial = readiness.ask(A)
    readiness.update([(0, GAP), (1, GAP), (0, Ready(A, serial))])
    assert readiness.to_ask_again() == [A]
    readiness.update([(1, Ready(A, serial))])
    assert readiness.to_ask_again() == []
    assert readiness.state(A) is Standing.READY


def test_a_gap_does_not_undo_a_failure(readiness):
    serial = readiness.ask(A)
    readiness.update([(1, GAP), (0, Failed(A, serial, TORN)), (1, GAP)])
    assert readiness.state(A) is Standing.FAILED
    assert readiness.to_ask_again() == []


def test_a_state_that_comes_and_goes_within_one_update_is_no_change(readiness):
    serial = readiness.ask(A)
    readiness.update([(0, Ready(A, serial))])
    told = [(1, Ready(A, serial)), (1, GAP)]
    assert readiness.update(told) == set()


@pytest.mark.parametrize("seed", range(20))
def test_however_ranks_are_interleaved_an_engine_that_asks_again_learns_the_truth(seed):
    """Ranks load, fail and lose adapters; some of what they say is lost in gaps."""
    rng = random.Random(seed)
    ranks, adapters = 3, range(1, 6)
    readiness = Readiness(ranks)
    has = [set() for _ in range(ranks)]
    said = [[] for _ in range(ranks)]

    def request(adapter_id):
        serial = readiness.ask(adapter_id)
        for rank in range(ranks):
            has[rank].add(adapter_id)
            said[rank].append(Ready(adapter_id, serial))

    def deliver(rank, count):
        events, said[rank] = said[rank][:count], said[rank][count:]
        if rng.random() < 0.1:
            events = [GAP]
        readiness.update([(rank, event) for event in events])

    for _ in range(300):
        rank, adapter_id = rng.randrange(ranks), rng.choice(adapters)
        if rng.random() < 0.2 and adapter_id in has[rank]:
            has[rank].remove(adapter_id)
            said[rank].append(Lost(adapter_id))
        elif rng.random() < 0.3 and readiness.state(adapter_id) is Standing.UNKNOWN:
            request(adapter_id)
        else:
            deliver(rank, rng.randrange(4))
        for adapter_id in readiness.to_ask_again():
            request(adapter_id)
    for rank in range(ranks):
        readiness.update([(rank, event) for event in said[rank]])
    for adapter_id in adapters:
        if readiness.state(adapter_id) is Standing.READY:
            assert all(adapter_id in each for each in has)
        else:
            assert readiness.state(adapter_id) is Standing.UNKNOWN


def test_ranks_that_do_not_exist_are_refused(readiness):
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        readiness.update([(2, Lost(A))])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Readiness(0)
