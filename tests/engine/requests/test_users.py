"""Who uses an adapter, and what routers are told of it; which version a request runs on."""

from tests.engine.fake_engine import lora
from tests.engine.scheduling.fake_scheduler import FakeRequest
from vllm_multilora.integration.blends import blended
from vllm_multilora.integration.engine.adapters import users as users_module
from vllm_multilora.integration.engine.adapters.users import AdapterUsers
from vllm_multilora.integration.engine.requests.weight_versions import Announcements, version_in
from vllm_multilora.metrics.label_values import BLENDS


def reported(users: AdapterUsers, *running: FakeRequest) -> tuple[list[str], list[str]]:
    return users.lists(running)


def test_adapters_run_and_wait_by_their_requests_and_those_without_are_not_named():
    users, base = AdapterUsers(), FakeRequest("base")
    assert reported(users, base) == ([], [])
    one, two = lora(1), lora(2)
    for adapter in (one, one, two):
        users.come(adapter)
    assert reported(users, base) == ([], ["adapter 1", "adapter 2"])
    assert reported(users, base, FakeRequest("a", one)) == (
        ["adapter 1"],
        ["adapter 1", "adapter 2"],
    )
    assert not users.leave(1)
    assert users.leave(2)
    assert reported(users, FakeRequest("b", one)) == (["adapter 1"], [])
    assert users.leave(1)
    assert users[1] == 0
    assert reported(users) == ([], [])
    assert not users._counts, "nothing is kept of adapters that come and go"


def test_requests_of_all_blends_are_counted_under_one_name():
    users = AdapterUsers()
    blends = [blended([(lora(1), weight), (lora(2), 1.0)]) for weight in (0.25, 0.5)]
    for blend in blends:
        users.come(blend)
    assert reported(users, *(FakeRequest(str(one.lora_int_id), one) for one in blends)) == (
        [BLENDS],
        [],
    )


def test_an_adapter_that_is_kept_keeps_no_other():
    users, notified_of = AdapterUsers(), list[tuple[int, bool]]()
    for number in (1, 2):
        users.come(lora(number))
        users.retire(
            number, 60.0, lambda leaves, number=number: notified_of.append((number, leaves))
        )
    users.keep({1})
    assert notified_of == [(1, False)]
    for number in (1, 2):
        users.leave(number)
    assert not users.let_go()
    assert notified_of == [(1, False), (2, True)]


def test_counts_of_adapters_that_the_engine_has_forgotten_are_forgotten(monkeypatch):
    monkeypatch.setattr(users_module, "MAX_KNOWN", 1)
    users = AdapterUsers()
    for number in (1, 2, 2):
        users.come(lora(number))
    users.forget_accepted([2])
    assert users.accepted == {1: 1, 2: 2}  # they are few
    users.come(lora(3))
    users.forget_accepted([2, 3])
    assert users.accepted == {2: 2, 3: 1}
    assert users[1] == 1


def test_a_version_is_reported_with_the_first_output_and_the_client_s_headers_stay():
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
