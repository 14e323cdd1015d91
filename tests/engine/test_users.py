"""Who uses an adapter, and what routers are told of it; which version a request runs on."""

from types import SimpleNamespace

from tests.engine.fake_scheduler import FakeRequest
from tests.engine.parties import lora
from vllm_multilora.integration.engine import users as users_module
from vllm_multilora.integration.engine.users import AdapterUsers
from vllm_multilora.integration.engine.versions import Announcements, version_in


def told(users: AdapterUsers, *running: FakeRequest) -> tuple[dict, dict]:
    stats = SimpleNamespace(running_lora_adapters={}, waiting_lora_adapters={})
    users.tell(stats, running)
    return stats.running_lora_adapters, stats.waiting_lora_adapters


def test_adapters_run_and_wait_by_their_requests_and_those_without_are_not_named():
    users, base = AdapterUsers(), FakeRequest("base")
    assert told(users, base) == ({}, {})
    one, two = lora(1), lora(2)
    for adapter in (one, one, two):
        users.come(adapter)
    assert told(users, base) == ({}, {"adapter 1": 2, "adapter 2": 1})
    assert told(users, base, FakeRequest("a", one)) == (
        {"adapter 1": 1},
        {"adapter 1": 1, "adapter 2": 1},
    )
    assert not users.leave(1)
    assert users.leave(2)
    assert told(users, FakeRequest("b", one)) == ({"adapter 1": 1}, {})
    assert users.leave(1)
    assert users[1] == 0
    assert told(users) == ({}, {})


def test_counts_of_adapters_that_the_engine_has_forgotten_are_forgotten(monkeypatch):
    monkeypatch.setattr(users_module, "MOST_KNOWN", 1)
    users = AdapterUsers()
    for number in (1, 2, 2):
        users.come(lora(number))
    users.forget_accepted([2])
    assert users.accepted == {1: 1, 2: 2}  # they are few
    users.come(lora(3))
    users.forget_accepted([2, 3])
    assert users.accepted == {2: 2, 3: 1}
    assert users[1] == 1


def test_a_version_is_told_with_the_first_output_and_the_client_s_headers_stay():
    announcements, request = Announcements(), FakeRequest("r", lora(1))
    request.trace_headers = {"traceparent": "x"}
    announcements.announce(request, "d")
    announcements.step()  # a step of its prompt, without an output
    assert version_in(request.trace_headers) == "d"
    request.steps = 1
    announcements.step()
    assert request.trace_headers == {"traceparent": "x"}
    announcements.announce(request, "e")  # preempted, and computed again with what is there now
    assert version_in(request.trace_headers) == "e"


def test_a_request_that_ends_without_an_output_is_followed_no_more():
    announcements, request = Announcements(), FakeRequest("r", lora(1))
    announcements.announce(request, "d")
    request.is_finished = lambda: True  # type: ignore[method-assign]
    announcements.step()
    assert request.trace_headers is None
