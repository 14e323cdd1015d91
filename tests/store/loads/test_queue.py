"""The order in which the store's queue starts loads."""

import pytest

from vllm_multilora.store.loads.queue import (
    IDLE_S,
    LONG_IDLE_S,
    MAX_OLD_JOBS,
    PATIENCE_S,
    LoadQueue,
    Purpose,
)


def started(queue: LoadQueue, now: float) -> list[int]:
    found = []
    while (number := queue.start_next(now)) is not None:
        found.append(number)
    return found


def fill(
    queue: LoadQueue,
    owners: str,
    purpose: Purpose = Purpose.REQUEST,
    first: int = 0,
    server: str = "server",
) -> None:
    for number, owner in enumerate(owners, first):
        queue.add(number, server, [owner], purpose, 100.0)


def order(queue: LoadQueue) -> list[int]:
    """The order in which loads start that are over at once."""
    found = []
    while (number := queue.start_next(0.0)) is not None:
        found.append(number)
        queue.remove(number)
    return found


@pytest.mark.parametrize("purpose", Purpose)
def test_servers_take_turns_whatever_each_of_them_waits_for(purpose):
    queue = LoadQueue()
    fill(queue, "abcd", purpose)
    fill(queue, "xy", purpose, first=10, server="other")
    assert order(queue) == [0, 10, 1, 11, 2, 3]


def test_while_a_server_waits_for_room_its_requests_and_nobody_elses_wait_too():
    queue = LoadQueue()
    fill(queue, "ab")
    assert queue.start_next(0.0) == 0
    queue.wait_for_room(0, 0.0)
    fill(queue, "xy", first=10, server="other")
    fill(queue, "z", Purpose.REGISTRATION, first=20)
    assert order(queue) == [10, 20, 11]
    queue.go_on(0, 0.0)
    assert order(queue) == [1]


def test_a_registration_that_a_request_waits_for_too_is_in_the_requests_queue():
    queue = LoadQueue()
    fill(queue, "aa")
    fill(queue, "xyz", Purpose.REGISTRATION, first=10)
    queue.promote(12)
    assert order(queue) == [0, 10, 12, 11, 1]


def test_a_job_that_works_keeps_its_place_until_patience_ends():
    queue = LoadQueue(places=1)
    fill(queue, "ab")
    assert started(queue, 0.0) == [0]
    now = 0.0
    while now < PATIENCE_S - IDLE_S:
        now += IDLE_S / 2
        queue.looked_at(0, now, now, is_ready=False)
        assert started(queue, now) == []
    queue.looked_at(0, PATIENCE_S, PATIENCE_S, is_ready=False)
    assert started(queue, PATIENCE_S) == [1]


def test_a_job_that_gets_no_processor_keeps_its_place():
    """Where the model has all of them, more jobs would only take longer, all of them."""
    queue = LoadQueue(places=1)
    fill(queue, "ab")
    assert started(queue, 0.0) == [0]
    now = 0.0
    while now < 10 * PATIENCE_S:
        now += IDLE_S / 2
        queue.looked_at(0, 0.01, now, is_ready=True)
        assert started(queue, now) == []
    queue.looked_at(0, 0.01, now + IDLE_S, is_ready=False)
    assert started(queue, now + IDLE_S) == [1]


@pytest.mark.parametrize("hanging", [4, 40])
def test_loads_that_hang_hold_up_another_for_less_than_patience(hanging):
    queue = LoadQueue(places=2)
    for number in range(hanging):
        queue.add(number, "server", [f"owner {number}"], Purpose.REQUEST, 100.0)
    queue.add(99, "server", ["another"], Purpose.REQUEST, 100.0)
    now, found = 0.0, []
    while 99 not in (found := found + started(queue, now)):
        now = queue.next_event(now)
    assert now < PATIENCE_S


def test_beside_too_many_hanging_jobs_the_longest_idle_is_killed_for_who_waits():
    queue = LoadQueue(places=1)
    for number in range(MAX_OLD_JOBS + 1):
        queue.add(number, "server", [f"{number}"], Purpose.REQUEST, 100.0)
    now = 0.0
    for _ in range(MAX_OLD_JOBS):
        assert len(started(queue, now)) == 1
        now += 1.5 * IDLE_S
    queue.looked_at(0, 1.0, now, is_ready=False)  # the first has worked meanwhile
    assert started(queue, now) == []
    now += LONG_IDLE_S
    assert queue.overdue(now) == [1]
    queue.remove(1)
    assert started(queue, now) == [MAX_OLD_JOBS]
    assert queue.overdue(now) == [], "nobody waits any more"


@pytest.fixture
def hanging() -> LoadQueue:
    """A queue whose jobs are as many as there may be, and have not worked since the time 1."""
    queue = LoadQueue(places=MAX_OLD_JOBS)
    for number in range(MAX_OLD_JOBS):
        queue.add(number, "server", [number], Purpose.REQUEST, 5.0 if number == 7 else 100.0)
    assert len(started(queue, 1.0)) == MAX_OLD_JOBS
    return queue


@pytest.mark.parametrize("by", ["waiting for room", "working"])
def test_there_are_only_so_many_jobs_without_a_place(hanging, by):
    now = 1.1 + IDLE_S
    hanging.add(99, "other", ["a"], Purpose.REQUEST, 100.0)
    assert started(hanging, now) == []
    if by == "working":
        hanging.looked_at(0, 0.1, now, is_ready=False)
    else:
        hanging.wait_for_room(0, now)
    assert started(hanging, now) == [99]


def test_a_job_that_hangs_is_killed_for_nobody_and_not_before_it_has_for_long(hanging):
    assert hanging.overdue(1.0 + LONG_IDLE_S) == []
    hanging.add(99, "other", ["a"], Purpose.REQUEST, 100.0)
    assert hanging.overdue(1.0 + 0.9 * LONG_IDLE_S) == []
    assert hanging.overdue(1.0 + LONG_IDLE_S) == [0]


def test_nobody_is_killed_for_others_beside_one_that_is_too_late(hanging):
    hanging.add(99, "other", ["a"], Purpose.REQUEST, 100.0)
    assert hanging.overdue(6.0) == [7]


def test_a_job_is_killed_at_its_deadline_whatever_it_does():
    queue = LoadQueue()
    queue.add(0, "server", ["a"], Purpose.REQUEST, 5.0)
    assert started(queue, 0.0) == [0]
    queue.looked_at(0, 4.9, 4.9, is_ready=False)
    assert queue.overdue(4.9) == []
    assert queue.next_event(4.9) == 5.0
    assert queue.overdue(5.0) == [0]


def test_the_clock_stands_still_while_a_job_waits_for_room():
    queue = LoadQueue(places=1)
    queue.add(0, "server", ["a"], Purpose.REQUEST, 5.0)
    started(queue, 0.0)
    queue.wait_for_room(0, 1.0)
    assert queue.overdue(1000.0) == []
    queue.go_on(0, 1000.0)
    assert queue.overdue(1003.9) == []
    assert queue.overdue(1004.0) == [0]


def test_a_job_that_has_got_room_has_its_place_again():
    queue = LoadQueue(places=1)
    fill(queue, "a")
    fill(queue, "b", Purpose.REGISTRATION, first=10)
    assert queue.start_next(0.0) == 0
    queue.wait_for_room(0, 0.0)
    queue.go_on(0, 1000.0)
    assert started(queue, 1000.0) == []


def test_nothing_is_due_while_those_that_were_started_wait_for_room():
    queue = LoadQueue()
    fill(queue, "ab")
    assert queue.start_next(0.0) == 0
    queue.wait_for_room(0, 0.0)
    assert queue.next_event(0.0) is None


def test_the_time_that_the_store_stood_still_is_no_jobs():
    queue = LoadQueue(places=1)
    queue.add(0, "server", ["a"], Purpose.REQUEST, 5.0)
    fill(queue, "b", first=1)
    assert queue.start_next(0.0) == 0
    queue.stood_still(1000.0)
    assert started(queue, 1000.0) == []
    assert queue.overdue(1004.9) == []
    assert queue.overdue(1005.0) == [0]
