"""An engine's adapters, their ways between the tiers, and what is shown of them."""

from pathlib import Path

from vllm_multilora.failures import FailureKind
from vllm_multilora.metrics.label_values import IDLE_S
from vllm_multilora.metrics.request_metrics import RequestMetrics
from vllm_multilora.slots.events import Tier
from vllm_multilora.states import AdapterState

from .fake_engine import MIB, EngineWithMetrics
from .readings import shown


def pick(folder: Path, *prefixes: str) -> dict[str, float]:
    """The values above 0 of metrics with these names, without their common beginning."""
    return {
        name.removeprefix("vllm:lora_").replace("engine=0,", "").replace("engine=0", ""): value
        for name, value in shown(folder).items()
        if value and any(name.startswith(f"vllm:lora_{prefix}{{") for prefix in prefixes)
    }


def test_an_empty_engine_shows_its_limits(tmp_path: Path) -> None:
    EngineWithMetrics(tmp_path)
    assert {name: value for name, value in shown(tmp_path).items() if value} == {
        "vllm:lora_slots{engine=0}": 2,
        "vllm:lora_slots_free{engine=0}": 2,
        "vllm:lora_max_rank{engine=0}": 64,
        "vllm:lora_cache_bytes_limit{engine=0,tier=cpu}": 100 * MIB,
        "vllm:lora_cache_adapters_limit{engine=0,tier=cpu}": 3,
    }


def test_loads_evictions_and_look_ups_are_counted_where_they_happen(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    for number in (1, 2, 3):
        engine.load(number)
    engine.step(1)
    engine.step(1)  # the same batch: no look-up
    engine.step(2)
    engine.step(1)  # joins again, and has its slot
    engine.step(3)  # takes b's
    engine.load(4, on_demand=True)  # takes b's host memory, and then a's slot
    engine.step(4)
    assert pick(tmp_path, "adapter_load_total", "adapter_evict_total") == {
        "adapter_load_total{lora_name=a,source=disk}": 1,
        "adapter_load_total{lora_name=b,source=disk}": 1,
        "adapter_load_total{lora_name=c,source=disk}": 1,
        "adapter_load_total{lora_name=d,source=disk}": 1,
        "adapter_load_total{lora_name=a,source=cpu}": 1,
        "adapter_load_total{lora_name=b,source=cpu}": 1,
        "adapter_load_total{lora_name=c,source=cpu}": 1,
        "adapter_load_total{lora_name=d,source=cpu}": 1,
        "adapter_evict_total{lora_name=b,tier=gpu}": 1,
        "adapter_evict_total{lora_name=a,tier=gpu}": 1,
        "adapter_evict_total{lora_name=b,tier=cpu}": 1,
    }
    assert pick(tmp_path, "cache_hits_total", "cache_misses_total") == {
        "cache_hits_total{tier=gpu}": 1,
        "cache_hits_total{tier=cpu}": 3,
        "cache_misses_total{tier=gpu}": 4,
        "cache_misses_total{tier=cpu}": 1,
    }
    assert pick(tmp_path, "adapter_load_duration_ms_sum", "batch_adapters_count") == {
        "adapter_load_duration_ms_sum{source=disk}": 80,
        "adapter_load_duration_ms_sum{source=cpu}": 20,
        "batch_adapters_count{}": 6,
    }


def test_gauges_follow_adapters_through_the_tiers(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    gauges = ("adapters_active", "slots_free", "cache_adapters", "cache_bytes")
    engine.load(1, rank=8)
    engine.load(2, rank=16)
    engine.step(2)
    assert pick(tmp_path, *gauges) == {
        "adapters_active{}": 1,
        "slots_free{}": 1,
        "cache_adapters{tier=gpu}": 1,
        "cache_adapters{tier=cpu}": 2,
        "cache_bytes{tier=gpu}": 16 * MIB,
        "cache_bytes{tier=cpu}": 24 * MIB,
    }
    engine.lose_slots()
    engine.unload(1)
    assert pick(tmp_path, *gauges) == {
        "slots_free{}": 2,
        "cache_adapters{tier=cpu}": 1,
        "cache_bytes{tier=cpu}": 16 * MIB,
    }


def test_an_unloaded_adapter_gives_its_info_back(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    engine.load(1)
    engine.pin(1)
    engine.step(1)
    assert list(pick(tmp_path, "adapter_info")) == [
        "adapter_info{lora_name=a,pinned=true,rank=8,tier=gpu}"
    ]
    engine.unload(1)
    assert pick(tmp_path, "adapter_info") == {}


def test_an_adapter_may_be_pinned_before_it_is_known(tmp_path: Path) -> None:
    """By its name, when it is first asked for."""
    engine = EngineWithMetrics(tmp_path)
    engine.pin(1)
    engine.load(1)
    (shown,) = pick(tmp_path, "adapter_info")
    assert "pinned=true" in shown


def test_an_adapter_in_a_slot_needs_no_host_memory_to_be_shown_there(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    engine.load(1)
    engine.step(1)
    engine.step()
    for number in (2, 3, 4):
        engine.load(number)
    assert 1 not in engine.host
    shown_of_a = "adapter_info{lora_name=a,pinned=false,rank=8,tier=gpu}"
    assert shown_of_a in pick(tmp_path, "adapter_info")
    assert pick(tmp_path, "cache_bytes")["cache_bytes{tier=gpu}"] == 8 * MIB
    engine.lose_slots()
    assert shown_of_a.replace("gpu", "disk") in pick(tmp_path, "adapter_info")


def test_an_evicted_adapter_that_is_not_known_is_counted_with_the_others(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    engine.metrics.evicted(Tier.CPU, 99)
    assert pick(tmp_path, "adapter_evict_total") == {
        "adapter_evict_total{lora_name=__other__,tier=cpu}": 1
    }


def test_a_new_version_takes_the_info_of_the_old_one_over(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    engine.load(1, rank=8)
    engine.names[2] = engine.names[1]
    engine.load(2, rank=16)
    newest = ["adapter_info{lora_name=a,pinned=false,rank=16,tier=cpu}"]
    assert list(pick(tmp_path, "adapter_info")) == newest
    engine.unload(1)
    assert list(pick(tmp_path, "adapter_info")) == newest


def test_adapters_that_never_came_take_no_label(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path, most=1)
    for number in (1, 2):
        engine.metrics.moved(number, AdapterState.FAILED)
        engine.metrics.failed(FailureKind.INVALID)
    engine.load(3)
    assert pick(tmp_path, "adapter_load_total", "adapter_info") == {
        "adapter_load_total{lora_name=c,source=disk}": 1,
        "adapter_info{lora_name=c,pinned=false,rank=8,tier=cpu}": 1,
    }


def test_adapters_beyond_the_bound_are_counted_together_and_have_no_info(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path, most=1)
    for number in (1, 2, 3):
        engine.load(number)
    assert pick(tmp_path, "adapter_load_total", "adapter_info") == {
        "adapter_load_total{lora_name=a,source=disk}": 1,
        "adapter_load_total{lora_name=__other__,source=disk}": 2,
        "adapter_info{lora_name=a,pinned=false,rank=8,tier=cpu}": 1,
    }


def test_an_adapter_that_gets_the_place_of_an_idle_one_is_shown_where_it_is(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path, most=1)
    requests = RequestMetrics(engine.recorder)
    for number in (1, 2):
        engine.load(number)
        engine.step(number)
    engine.now += IDLE_S
    requests.accept("1", 2, "b", is_ready=True)
    assert pick(tmp_path, "adapter_load_total", "adapter_info", "requests_by_adapter") == {
        "adapter_load_total{lora_name=__other__,source=disk}": 1,
        "adapter_load_total{lora_name=__other__,source=cpu}": 1,
        "adapter_info{lora_name=b,pinned=false,rank=8,tier=gpu}": 1,
        "requests_by_adapter{lora_name=b}": 1,
    }
    engine.unload(1)
    engine.unload(2)
    assert pick(tmp_path, "adapter_info") == {}


def test_failures_are_counted_by_reason_and_all_reasons_are_there_from_the_start(
    tmp_path: Path,
) -> None:
    engine = EngineWithMetrics(tmp_path)
    engine.metrics.failed(FailureKind.GONE)
    engine.metrics.failed(FailureKind.GONE)
    found = {
        name.partition("reason=")[2].removesuffix("}"): value
        for name, value in shown(tmp_path).items()
        if "failures" in name
    }
    assert found == {kind.value: 2 if kind is FailureKind.GONE else 0 for kind in FailureKind}


def test_a_new_version_in_the_same_slot_counts_with_its_own_bytes(tmp_path: Path) -> None:
    engine = EngineWithMetrics(tmp_path)
    engine.load(1, rank=8)
    engine.step(1)
    engine.step()
    engine.usage.read(1, rank=16, size=16 * MIB)
    engine.slots.assign(1, pack=2)
    engine.metrics.contents(engine.slots.contents)
    assert pick(tmp_path, "cache_bytes")["cache_bytes{tier=gpu}"] == 16 * MIB
