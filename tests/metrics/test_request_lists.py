"""Which adapters have requests, as several API servers are told, and show."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Gauge

from vllm_multilora.integration.server.requests import metrics_route
from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.process_stamps import ProcessStamp
from vllm_multilora.metrics.request_lists import RequestLists


def shown_lists(folder: Path) -> list[tuple[str, str, str]]:
    """Slots, running and waiting adapters of each sample."""
    return [
        (labels["max_lora"], labels["running_lora_adapters"], labels["waiting_lora_adapters"])
        for labels in (sample.labels for sample in samples(folder))
    ]


def samples(folder: Path) -> list[Any]:
    collector = LoRACollector()
    collector.show(folder)
    return [
        sample
        for metric in collector.collect()
        if metric.name == "vllm:lora_requests_info"
        for sample in metric.samples
    ]


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RequestLists]:
    """Two, each of which has been told of an engine."""
    made = []
    for number in (1, 2):
        stamp = ProcessStamp(1, number, 1)
        monkeypatch.setattr(ProcessStamp, "own", lambda stamp=stamp: stamp)
        made.append(RequestLists(tmp_path))
        made[-1].tell(number, 2, [], [])
    return made


def test_where_nobody_was_told_anything_nothing_is_shown(tmp_path: Path) -> None:
    assert samples(tmp_path) == []


def test_of_each_engine_the_newest_lists_are_shown_whoever_was_told(
    tmp_path: Path, servers: list[RequestLists]
) -> None:
    one, two = servers
    one.tell(1, 2, ["a", "b"], ["c"])
    two.tell(2, 2, ["b", "d"], [])
    assert shown_lists(tmp_path) == [("4", "a,b,d", "c")]
    two.tell(1, 2, ["c"], [])
    assert shown_lists(tmp_path) == [("4", "c,b,d", "")]
    one.tell(1, 2, ["a", "b"], ["c"])  # as it was told before
    assert shown_lists(tmp_path) == [("4", "a,b,d", "c")]
    for engine in (1, 2):
        one.tell(engine, 2, [], [])
    assert shown_lists(tmp_path) == [("4", "", "")]


def test_the_newest_lists_are_shown_though_the_clock_was_set_back(
    tmp_path: Path, servers: list[RequestLists], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers
    one.tell(1, 2, ["a"], [])
    before = time.time()
    monkeypatch.setattr(time, "time", lambda: before - 3600)
    two.tell(1, 2, [], [])
    assert shown_lists(tmp_path) == [("4", "", "")]


def test_the_value_is_the_time_at_which_it_was_so(
    tmp_path: Path, servers: list[RequestLists]
) -> None:
    begun = time.time()
    servers[0].tell(1, 2, [], [])
    (sample,) = samples(tmp_path)
    assert begun <= sample.value <= time.time()


def test_a_line_that_is_half_written_is_not_shown(
    tmp_path: Path, servers: list[RequestLists]
) -> None:
    servers[0].tell(1, 2, ["a"], [])
    servers[1].tell(2, 2, ["b"], [])
    (path,) = tmp_path.glob("1-*.lists")
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"c"'))
    assert shown_lists(tmp_path) == [("2", "b", "")]


LABELS = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")


class Stats(SimpleNamespace):
    """A `PrometheusStatLogger`, as far as lists go."""

    def __init__(self, *, is_on: bool) -> None:
        super().__init__(
            gauge_lora_info=Gauge("lists", "Of adapters.", LABELS, registry=CollectorRegistry()),
            max_lora=2,
            vllm_config=SimpleNamespace(
                lora_config=object(), additional_config={"multilora": {"enabled": is_on}}
            ),
        )

    def record(self, scheduler_stats: Any, iteration_stats: Any, *, engine_idx: int) -> None:
        if scheduler_stats is not None and self.gauge_lora_info is not None:
            running = ",".join(scheduler_stats.running_lora_adapters)
            self.gauge_lora_info.labels(self.max_lora, "", running).set(1)

    def step(self, *running: str, engine: int = 1) -> None:
        """Records a step, as the plugin has it."""
        lists = SimpleNamespace(
            running_lora_adapters=dict.fromkeys(running, 1), waiting_lora_adapters={}
        )
        for told in (lists, None):
            metrics_route.record(Stats.record, self, told, None, engine_idx=engine)

    @property
    def vllms(self) -> list[str]:
        """The lists that vLLM's metric has."""
        families = self.gauge_lora_info.collect() if self.gauge_lora_info else ()
        samples = (sample for family in families for sample in family.samples)
        return [sample.labels["running_lora_adapters"] for sample in samples]


@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_several_servers_show_the_newest_lists_alone_however_many_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    """With the plugin off, vLLM's metrics are as they are without it."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    monkeypatch.setattr(metrics_route._COLLECTOR, "folder", tmp_path)
    stats = Stats(is_on=is_on)
    for number in range(9):
        stats.step(f"{number}")
    assert len(stats.vllms) == (0 if is_on else 9)
    assert shown_lists(tmp_path) == ([("2", "8", "")] if is_on else [])
    assert len(list(tmp_path.glob("*.lists"))) == is_on


def test_a_server_goes_on_where_lists_cannot_be_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    monkeypatch.setattr(metrics_route._COLLECTOR, "folder", tmp_path / "gone")
    Stats(is_on=True).step("a")


@pytest.mark.parametrize("is_on", [True, False], ids=["on", "off"])
def test_one_servers_metric_forgets_old_lists(monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    stats = Stats(is_on=is_on)
    for number in (*range(9), 0):
        stats.step(f"{number}")
    assert stats.vllms == (["0"] if is_on else [f"{number}" for number in range(9)])


def test_one_server_shows_the_newest_lists_of_all_its_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with `--data-parallel-size 2 --api-server-count 1`."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    stats = Stats(is_on=True)
    stats.step("a", engine=0)
    stats.step("b", engine=1)
    assert stats.vllms == ["a,b"]
    stats.step(engine=0)
    (family,) = stats.gauge_lora_info.collect()
    assert [sample.labels for sample in family.samples] == [
        dict(zip(LABELS, ("4", "", "b"), strict=True))
    ]
