"""Requests by adapter: accepted, unfinished, and how long their adapter kept them waiting."""

from pathlib import Path

from vllm_multilora.metrics.request_metrics import RequestMetrics

from .readings import recorder, shown

REQUESTED = "vllm:lora_adapters_wanted{engine=0}"
WAITS = "vllm:lora_request_wait_seconds"


class Requests:
    def __init__(self, folder: Path) -> None:
        self.now = 100.0
        self.recorder = recorder(folder, "engine")
        self.metrics = RequestMetrics(self.recorder, clock=lambda: self.now)

    def accept(self, request_id: str, adapter: str, *, is_ready: bool = True) -> None:
        self.metrics.accept(request_id, ord(adapter), adapter, is_ready=is_ready)

    def finish(self, request_id: str, adapter: str) -> None:
        self.metrics.finish(request_id, ord(adapter))


def test_requests_are_counted_when_they_are_accepted(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    for adapter in "ab":
        requests.recorder.names.admit(adapter)
    for number, adapter in enumerate("aab"):
        requests.accept(f"{number}", adapter)
        requests.finish(f"{number}", adapter)
    found = shown(tmp_path)
    assert found["vllm:lora_requests_by_adapter{engine=0,lora_name=a}"] == 2
    assert found["vllm:lora_requests_by_adapter{engine=0,lora_name=b}"] == 1


def test_an_adapter_is_requested_while_it_has_an_unfinished_request(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    requested = []
    for act, *what in (
        *((requests.accept, "1", "a"), (requests.accept, "2", "a"), (requests.accept, "3", "b")),
        *((requests.finish, "1", "a"), (requests.finish, "2", "a"), (requests.finish, "3", "b")),
    ):
        act(*what)  # type: ignore[operator]
        requested.append(shown(tmp_path)[REQUESTED])
    assert requested == [1, 1, 2, 2, 1, 0]


def test_a_request_waits_until_its_adapter_is_there(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    requests.accept("ready", "a")
    requests.accept("early", "b", is_ready=False)
    requests.now += 2
    requests.accept("late", "b", is_ready=False)
    requests.now += 2
    requests.metrics.settled(ord("b"))
    requests.metrics.settled(ord("b"))
    found = shown(tmp_path)
    assert found[f"{WAITS}_count{{engine=0}}"] == 3
    assert found[f"{WAITS}_sum{{engine=0}}"] == 6
    assert found[f"{WAITS}_bucket{{engine=0,le=0.001}}"] == 1


def test_a_request_that_is_given_up_while_it_waits_is_no_wait(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    requests.accept("1", "a", is_ready=False)
    requests.finish("1", "a")
    found = shown(tmp_path)
    assert found[f"{WAITS}_count{{engine=0}}"] == 0
    assert found[REQUESTED] == 0


def test_requests_for_a_cold_adapter_count_under_its_name_when_it_has_come(
    tmp_path: Path,
) -> None:
    requests = Requests(tmp_path)
    for number in range(3):
        requests.accept(f"{number}", "a", is_ready=False)
    requests.finish("0", "a")  # given up
    requests.recorder.names.admit("a")
    requests.metrics.settled(ord("a"))
    assert shown(tmp_path)["vllm:lora_requests_by_adapter{engine=0,lora_name=a}"] == 3


def test_requests_for_what_cannot_be_had_count_with_the_others(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    for number in range(50):
        requests.accept(f"{number}", chr(1000 + number), is_ready=False)
        requests.metrics.settled(1000 + number)
    requests.accept("gone", "z", is_ready=False)
    requests.finish("gone", "z")
    found = {name: n for name, n in shown(tmp_path).items() if "requests_by_adapter" in name}
    assert found == {"vllm:lora_requests_by_adapter{engine=0,lora_name=__other__}": 51}
