"""vLLM 0.29's and 0.30's way of scheduling asks our scheduler of every waiting request, too."""

import pytest
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import RequestStatus

from tests.engine.scheduling.fake_scheduler import FakeRequest
from vllm_multilora.integration.engine.scheduling.older_scheduler import with_newer_parts


class OlderScheduler:
    """The part of vLLM 0.29's scheduler that takes requests out of its two queues."""

    def __init__(self) -> None:
        self.waiting = create_request_queue(SchedulingPolicy.FCFS)
        self.skipped_waiting = create_request_queue(SchedulingPolicy.FCFS)
        self.max_num_running_reqs = 2
        self.running: list[FakeRequest] = []

    def add_request(self, request: FakeRequest) -> None:
        is_blocked = self._is_blocked_waiting_status(request.status)
        (self.skipped_waiting if is_blocked else self.waiting).add_request(request)

    def schedule(self) -> None:
        skipped = create_request_queue(SchedulingPolicy.FCFS)
        while (self.waiting or self.skipped_waiting) and len(self.running) < 2:
            queue = self.skipped_waiting or self.waiting
            request = queue.pop_request()
            if self._is_blocked_waiting_status(
                request.status
            ) and not self._try_promote_blocked_waiting_request(request):
                skipped.prepend_request(request)
                continue
            request.status = RequestStatus.RUNNING
            self.running.append(request)
        if skipped:
            self.skipped_waiting.prepend_requests(skipped)

    @staticmethod
    def _is_blocked_waiting_status(status: RequestStatus) -> bool:
        return status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR

    def _try_promote_blocked_waiting_request(self, request: FakeRequest) -> bool:
        if request.has_grammar:
            request.status = RequestStatus.WAITING
        return request.has_grammar


class HoldingScheduler(with_newer_parts(OlderScheduler)):
    """Holds requests back as `AdapterAwareMixin` does."""

    def __init__(self) -> None:
        super().__init__()
        self.held: set[str] = set()

    def _handle_blocked_waiting_request(self, request: FakeRequest) -> bool:
        may_run = super()._handle_blocked_waiting_request(request)
        return may_run and request.request_id not in self.held


@pytest.fixture
def scheduler() -> HoldingScheduler:
    return HoldingScheduler()


def running(scheduler: HoldingScheduler) -> list[str]:
    scheduler.schedule()
    return [request.request_id for request in scheduler.running]


def waiting(scheduler: HoldingScheduler) -> list[str]:
    return [request.request_id for request in scheduler.waiting]


def test_a_request_that_is_held_back_waits_before_later_ones(scheduler):
    for name in "abc":
        scheduler.add_request(FakeRequest(name))
    scheduler.held = {"a", "b"}
    assert running(scheduler) == ["c"]
    assert waiting(scheduler) == ["a", "b"]
    scheduler.held = set()
    assert running(scheduler) == ["c", "a"]
    assert waiting(scheduler) == ["b"]


def test_a_request_without_its_grammar_waits_in_the_one_queue(scheduler):
    status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(blocked := FakeRequest("a", has_grammar=False, status=status))
    scheduler.add_request(FakeRequest("b"))
    assert waiting(scheduler) == ["a", "b"]
    assert not scheduler.skipped_waiting
    assert running(scheduler) == ["b"]
    assert waiting(scheduler) == ["a"]
    blocked.has_grammar = True
    assert running(scheduler) == ["b", "a"]


def test_a_newer_scheduler_stays_as_it_is():
    newer = type("Newer", (), {"_handle_blocked_waiting_request": lambda self, request: True})
    assert with_newer_parts(newer) is newer


def test_places_are_those_of_running_requests(scheduler):
    assert scheduler.max_num_active_reqs == scheduler.max_num_running_reqs
    assert not scheduler.kv_holding_waiting
