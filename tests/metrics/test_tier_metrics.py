"""A worker's adapters, their ways between the tiers, and what is shown of them."""

from pathlib import Path

from vllm_multilora.cache.load_failures import FailureKind

from .fake_cache import MIB, CacheWithMetrics
from .readings import shown


def pick(folder: Path, *prefixes: str) -> dict[str, float]:
    """The values above 0 of metrics with these names, without their common beginning."""
    return {
        name.removeprefix("vllm:lora_").replace("engine=0,", "").replace("engine=0", ""): value
        for name, value in shown(folder).items()
        if value and any(name.startswith(f"vllm:lora_{prefix}{{") for prefix in prefixes)
    }


def test_an_empty_worker_shows_its_limits(tmp_path: Path) -> None:
    CacheWithMetrics(tmp_path)
    assert {name: value for name, value in shown(tmp_path).items() if value} == {
        "vllm:lora_slots{engine=0}": 2,
        "vllm:lora_slots_free{engine=0}": 2,
        "vllm:lora_max_rank{engine=0}": 64,
        "vllm:lora_cache_bytes_limit{engine=0,tier=cpu}": 100 * MIB,
        "vllm:lora_cache_adapters_limit{engine=0,tier=cpu}": 3,
    }


def test_loads_evictions_and_look_ups_are_counted_where_they_happen(tmp_path: Path) -> None:
    worker = CacheWithMetrics(tmp_path)
    for number in (1, 2, 3):
        worker.load(number)
    worker.step(1)
    worker.step(1)  # the same batch: no look-up
    worker.step(2)
    worker.step(1)  # joins again, and has its slot
    worker.step(3)  # takes b's
    worker.load(4, evict=True)  # takes b's host memory, and then a's slot
    worker.step(4)
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
    worker = CacheWithMetrics(tmp_path)
    gauges = ("adapters_active", "slots_free", "cache_adapters", "cache_bytes")
    worker.load(1, rank=8)
    worker.load(2, rank=16)
    worker.step(2)
    assert pick(tmp_path, *gauges) == {
        "adapters_active{}": 1,
        "slots_free{}": 1,
        "cache_adapters{tier=gpu}": 1,
        "cache_adapters{tier=cpu}": 2,
        "cache_bytes{tier=gpu}": 16 * MIB,
        "cache_bytes{tier=cpu}": 24 * MIB,
    }
    worker.cache.clear_slots()
    worker.cache.end_step()
    worker.cache.remove(1)
    worker.metrics.settle(worker.cache)
    assert pick(tmp_path, *gauges) == {
        "slots_free{}": 2,
        "cache_adapters{tier=cpu}": 1,
        "cache_bytes{tier=cpu}": 16 * MIB,
    }


def test_an_unloaded_adapter_gives_its_info_back(tmp_path: Path) -> None:
    worker = CacheWithMetrics(tmp_path)
    worker.load(1)
    worker.cache.pin(1)
    worker.metrics.pinned(1)
    worker.step(1)
    assert list(pick(tmp_path, "adapter_info")) == [
        "adapter_info{lora_name=a,pinned=true,rank=8,tier=gpu}"
    ]
    worker.cache.end_step()
    worker.cache.remove(1)
    worker.metrics.settle(worker.cache)
    assert pick(tmp_path, "adapter_info") == {}


def test_a_new_version_takes_the_info_of_the_old_one_over(tmp_path: Path) -> None:
    worker = CacheWithMetrics(tmp_path)
    worker.load(1, rank=8)
    worker.names[2] = worker.names[1]
    worker.load(2, rank=16)
    newest = ["adapter_info{lora_name=a,pinned=false,rank=16,tier=cpu}"]
    assert list(pick(tmp_path, "adapter_info")) == newest
    worker.cache.remove(1)
    worker.metrics.settle(worker.cache)
    assert list(pick(tmp_path, "adapter_info")) == newest


def test_adapters_beyond_the_bound_are_counted_together_and_have_no_info(tmp_path: Path) -> None:
    worker = CacheWithMetrics(tmp_path, most=1)
    for number in (1, 2, 3):
        worker.load(number)
    assert pick(tmp_path, "adapter_load_total", "adapter_info") == {
        "adapter_load_total{lora_name=a,source=disk}": 1,
        "adapter_load_total{lora_name=__other__,source=disk}": 2,
        "adapter_info{lora_name=a,pinned=false,rank=8,tier=cpu}": 1,
    }


def test_failures_are_counted_by_reason_and_all_reasons_are_there_from_the_start(
    tmp_path: Path,
) -> None:
    worker = CacheWithMetrics(tmp_path)
    worker.metrics.failed(FailureKind.GONE)
    worker.metrics.failed(FailureKind.GONE)
    found = {
        name.partition("reason=")[2].removesuffix("}"): value
        for name, value in shown(tmp_path).items()
        if "failures" in name
    }
    assert found == {kind.value: 2 if kind is FailureKind.GONE else 0 for kind in FailureKind}
