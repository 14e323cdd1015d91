"""Which adapters have requests, as several API servers are told, and show."""

import time
from pathlib import Path
from typing import Any

import pytest

from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.request_lists import RequestLists
from vllm_multilora.metrics.series_file import ProcessStamp


def shown_lists(folder: Path) -> list[tuple[str, str, str]]:
    """Slots, running and waiting adapters of each sample."""
    return [
        (labels["max_lora"], labels["running_lora_adapters"], labels["waiting_lora_adapters"])
        for labels in (sample.labels for sample in samples(folder))
    ]


def samples(folder: Path) -> list[Any]:
    collector = LoRACollector()
    collector.show_lists()
    collector.show(folder)
    return [
        sample
        for metric in collector.collect()
        if metric.name == "vllm:lora_requests_info"
        for sample in metric.samples
    ]


@pytest.fixture
def engines(tmp_path: Path) -> list[RequestLists]:
    """Two with two slots each, which have said that there are no requests."""
    made = [RequestLists(tmp_path, number, 2) for number in (1, 2)]
    for each in made:
        each.say([], [])
    return made


def test_nothing_is_shown_before_an_engine_has_said_anything(tmp_path: Path) -> None:
    assert samples(tmp_path) == []


def test_newest_lists_of_all_engines_are_shown_as_one(
    tmp_path: Path, engines: list[RequestLists]
) -> None:
    one, two = engines
    one.say(["a", "b"], ["c"])
    two.say(["b", "d"], [])
    assert shown_lists(tmp_path) == [("4", "a,b,d", "c")]
    one.say(["c"], [])
    assert shown_lists(tmp_path) == [("4", "c,b,d", "")]
    for each in engines:
        each.say([], [])
    assert shown_lists(tmp_path) == [("4", "", "")]


def test_lists_of_a_restarted_engine_are_shown_though_the_clock_was_set_back(
    tmp_path: Path, engines: list[RequestLists], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines[0].say(["a"], [])
    before = time.time()
    monkeypatch.setattr(time, "time", lambda: before - 3600)
    monkeypatch.setattr(ProcessStamp, "own", lambda: ProcessStamp(1, 1, 1))
    RequestLists(tmp_path, 1, 2).say([], [])
    assert shown_lists(tmp_path) == [("4", "", "")]


def test_value_is_the_time_at_which_the_lists_were_said(
    tmp_path: Path, engines: list[RequestLists]
) -> None:
    begun = time.time()
    engines[0].say(["a"], [])
    (sample,) = samples(tmp_path)
    assert begun <= sample.value <= time.time()


def test_lists_that_stay_the_same_are_written_once_a_second(
    tmp_path: Path, engines: list[RequestLists], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines[0].say(["a"], [])
    (before,) = samples(tmp_path)
    engines[0].say(["a"], [])
    assert samples(tmp_path) == [before]
    later = time.monotonic() + 2
    monkeypatch.setattr(time, "monotonic", lambda: later)
    engines[0].say(["a"], [])
    (after,) = samples(tmp_path)
    assert after.value > before.value


def test_line_that_is_half_written_is_not_shown(
    tmp_path: Path, engines: list[RequestLists]
) -> None:
    engines[0].say(["a"], [])
    engines[1].say(["b"], [])
    (path,) = tmp_path.glob("1-*.lists")
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"c"'))
    assert shown_lists(tmp_path) == [("2", "b", "")]
