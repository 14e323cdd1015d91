"""Values of several processes, living and dead, become one set of metrics."""

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.promtool import run_promtool
from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.collector import LoRACollector
from vllm_multilora.metrics.definitions import AdapterInfo
from vllm_multilora.metrics.value_folder import locked

from .readings import MODEL, in_another_process, recorder, shown


def test_without_values_nothing_is_shown(tmp_path: Path) -> None:
    assert shown(tmp_path) == {}
    assert shown(tmp_path / "missing") == {}
    assert list(LoRACollector().collect()) == []


def test_engines_are_distinguished_by_a_label_and_servers_have_none(tmp_path: Path) -> None:
    for engine, active in (("0", 3), ("1", 5)):
        recorder(tmp_path, engine=engine).series(defined.ACTIVE).set(active)
    recorder(tmp_path, "server", engine="").series(defined.ROUTE_REQUESTS, "r", "a", "w").inc()
    assert shown(tmp_path) == {
        "vllm:lora_adapters_active{engine=0}": 3,
        "vllm:lora_adapters_active{engine=1}": 5,
        "vllm:lora_route_requests_total{lora_name=a,reason=w,route=r}": 1,
    }


def test_what_a_dead_process_counted_counts_and_its_gauges_do_not(tmp_path: Path) -> None:
    in_another_process(
        """
record.series(defined.LOADS, "disk", "acme").inc(5)
record.series(defined.REQUESTS, "acme").inc(7)
record.series(defined.ACTIVE).set(3)
record.series(defined.SLOTS).set(4)
record.histogram(defined.LOAD_DURATION, "disk").observe(20.0)
""",
        tmp_path,
    )
    dead = shown(tmp_path)
    assert dead["vllm:lora_adapter_load_total{engine=0,lora_name=acme,source=disk}"] == 5
    assert not [name for name in dead if "active" in name or "slots" in name]

    successor = recorder(tmp_path)
    successor.series(defined.LOADS, "disk", "acme").inc()
    successor.series(defined.ACTIVE).set(1)
    successor.histogram(defined.LOAD_DURATION, "disk").observe(30.0)
    both = shown(tmp_path)
    assert both["vllm:lora_adapter_load_total{engine=0,lora_name=acme,source=disk}"] == 6
    assert both["vllm:lora_requests_by_adapter{engine=0,lora_name=acme}"] == 7
    assert both["vllm:lora_adapters_active{engine=0}"] == 1
    assert "vllm:lora_slots{engine=0}" not in both
    assert both["vllm:lora_adapter_load_duration_ms_count{engine=0,source=disk}"] == 2
    assert both["vllm:lora_adapter_load_duration_ms_sum{engine=0,source=disk}"] == 50


def test_a_histogram_counts_up_to_each_bound(tmp_path: Path) -> None:
    histogram = recorder(tmp_path).histogram(defined.LOAD_DURATION, "cpu")
    for milliseconds in (0.05, 0.1, 0.2, 500.0, 70_000.0):
        histogram.observe(milliseconds)
    found = shown(tmp_path)
    name = "vllm:lora_adapter_load_duration_ms"
    counts = {
        bound: found[f"{name}_bucket{{engine=0,le={bound},source=cpu}}"]
        for bound in ("0.1", "0.25", "250.0", "500.0", "60000.0", "+Inf")
    }
    assert counts == {"0.1": 2, "0.25": 3, "250.0": 3, "500.0": 4, "60000.0": 4, "+Inf": 5}
    assert found[f"{name}_count{{engine=0,source=cpu}}"] == 5
    assert found[f"{name}_sum{{engine=0,source=cpu}}"] == pytest.approx(70_500.35)


def test_an_adapters_info_is_one_series_that_changes_and_goes(tmp_path: Path) -> None:
    series = recorder(tmp_path).series_at((defined.INFO.name, "acme"))
    for tier, pinned in (("gpu", True), ("disk", False)):
        series.set(AdapterInfo(tier, 16, pinned).encode())
        labels = f"engine=0,lora_name=acme,pinned={str(pinned).lower()},rank=16,tier={tier}"
        assert shown(tmp_path) == {f"vllm:lora_adapter_info{{{labels}}}": 1}
    series.set(0)
    assert shown(tmp_path) == {}


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x40\x00\x00\x00" + b"\x05" * 100])
def test_a_damaged_file_is_left_out_and_the_others_are_shown(
    tmp_path: Path, content: bytes
) -> None:
    recorder(tmp_path).series(defined.ACTIVE).set(3)
    (tmp_path / "engine-0-1-2-3.series").write_bytes(content)
    (tmp_path / "something else.series").write_bytes(content)
    assert shown(tmp_path) == {"vllm:lora_adapters_active{engine=0}": 3}


def test_the_registry_never_sees_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = CollectorRegistry()
    Counter("other", "Of somebody else.", registry=registry).inc()
    collector = LoRACollector()
    collector.show(tmp_path)
    registry.register(collector)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vllm_multilora.metrics.collector._files", broken)
    assert b"other_total 1.0" in generate_latest(registry)


def test_a_change_to_several_files_is_shown_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = recorder(tmp_path).series(defined.ACTIVE)
    change = ExitStack()
    change.enter_context(locked(tmp_path, exclusively=True))

    def complete(_: float) -> None:
        series.set(3)
        change.close()

    monkeypatch.setattr("time.sleep", complete)
    assert shown(tmp_path) == {"vllm:lora_adapters_active{engine=0}": 3}


WRITER = """
from pathlib import Path
from tests.metrics.readings import recorder
from vllm_multilora.metrics import definitions as defined
record = recorder(Path({folder!r}), most={adapters})
for turn in range({turns}):
    for adapter in range({adapters}):
        record.series(defined.LOADS, "disk", f"adapter-{{adapter}}").inc()
        record.histogram(defined.LOAD_DURATION, "disk").observe(float(turn))
"""


def test_scrapes_in_the_midst_of_writing_are_whole_and_never_go_back(tmp_path: Path) -> None:
    adapters, turns = 50, 400
    code = WRITER.format(folder=str(tmp_path), adapters=adapters, turns=turns)
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        last: dict[str, float] = {}
        deadline = time.monotonic() + 60
        scrapes = 0
        while writer.poll() is None:
            assert time.monotonic() < deadline
            found = shown(tmp_path)
            assert all(found.get(name, 0) >= value for name, value in last.items())
            loads = [
                found.get(f"vllm:lora_adapter_load_total{{{labels(i)}}}", 0) for i in range(50)
            ]
            assert max(loads) - min(loads) <= 1
            last, scrapes = found, scrapes + 1
    assert writer.returncode == 0
    assert scrapes > 3
    total = adapters * turns
    assert (
        shown(tmp_path)["vllm:lora_adapter_load_duration_ms_count{engine=0,source=disk}"] == total
    )


def labels(adapter: int) -> str:
    return f"engine=0,lora_name=adapter-{adapter},source=disk"


def test_threads_of_a_process_lose_no_count(tmp_path: Path) -> None:
    record = recorder(tmp_path)

    def count() -> None:
        for _ in range(2_000):
            record.series(defined.LOADS, "disk", "acme").inc()
            record.histogram(defined.LOAD_DURATION, "disk").observe(1.0)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = shown(tmp_path)
    assert found["vllm:lora_adapter_load_total{engine=0,lora_name=acme,source=disk}"] == 8_000
    assert found["vllm:lora_adapter_load_duration_ms_sum{engine=0,source=disk}"] == 8_000


def everything(folder: Path) -> str:
    """The exposition of every metric there is."""
    record = recorder(folder)
    for definition in defined.ALL:
        values = ["x"] * len(definition.labels)
        if definition is defined.INFO:
            record.series_at((definition.name, "x")).set(AdapterInfo("gpu", 8, False).encode())
        elif definition.kind is defined.Kind.HISTOGRAM:
            record.histogram(definition, *values).observe(1.0)
        else:
            record.series(definition, *values).inc()
    registry = CollectorRegistry()
    collector = LoRACollector()
    collector.show(folder)
    registry.register(collector)
    return generate_latest(registry).decode()


def test_every_metric_is_exposed_under_its_name_and_labels(tmp_path: Path) -> None:
    families = {f.name: f for f in text_string_to_metric_families(everything(tmp_path))}
    for definition in defined.ALL:
        is_counter = definition.kind is defined.Kind.COUNTER
        family = families[definition.name.removesuffix("_total") if is_counter else definition.name]
        assert family.type == definition.kind.value
        assert family.documentation == definition.help
        sample = family.samples[-1]
        assert sample.labels.keys() - {"le"} == {"model_name", "engine", *definition.labels}
        assert sample.labels["model_name"] == MODEL
        if definition.kind is not defined.Kind.HISTOGRAM:
            assert sample.name == definition.name


FORCED = (
    # vLLM's prefix, and so every name of vLLM's.
    "metric names should not contain ':'",
    # Names that were asked for.
    'vllm:lora_adapter_load_duration_ms use base unit "seconds" instead of "milliseconds"',
    "vllm:lora_adapter_load_duration_ms metric names should not contain abbreviated units",
)


def test_promtool_finds_only_what_the_names_force(tmp_path: Path) -> None:
    checked = run_promtool("check", "metrics", text=everything(tmp_path))
    complaints = checked.stderr.splitlines() + checked.stdout.splitlines()
    assert [line for line in complaints if not any(known in line for known in FORCED)] == []
