"""What routers read, made of what is recorded anyway."""

from pathlib import Path

from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.definitions import AdapterInfo

from .readings import recorder, shown_to_routers


def test_loaded_adapters_are_those_in_a_slot_or_in_host_memory(tmp_path: Path) -> None:
    record = recorder(tmp_path, "engine")
    for name, tier, pinned in (("a", "gpu", True), ("b", "cpu", False), ("c", "disk", False)):
        info = AdapterInfo(tier, 16, pinned).encode()
        record.series_at((defined.INFO.name, name)).set(info)
    record.series_at((defined.INFO.name, "unloaded")).set(0)
    assert shown_to_routers(tmp_path) == {
        "vllm:lora_adapter_loaded{adapter_name=a,engine=0,level=gpu,pinned=true,rank=16}": 1,
        "vllm:lora_adapter_loaded{adapter_name=b,engine=0,level=cpu,pinned=false,rank=16}": 1,
    }


def test_numbers_are_those_of_the_tiers(tmp_path: Path) -> None:
    record = recorder(tmp_path, "engine")
    record.series(defined.SLOTS).set(8)
    record.series(defined.ACTIVE).set(3)
    record.series(defined.CACHE_ADAPTERS, "gpu").set(3)
    record.series(defined.CACHE_ADAPTERS, "cpu").set(5)
    assert shown_to_routers(tmp_path) == {
        "vllm:max_gpu_lora_adapters{engine=0}": 8,
        "vllm:num_gpu_loaded_lora_adapters{engine=0}": 3,
        "vllm:num_cpu_loaded_lora_adapters{engine=0}": 5,
    }


def test_load_times_are_in_seconds_by_transition(tmp_path: Path) -> None:
    record = recorder(tmp_path, "engine")
    record.histogram(defined.LOAD_DURATION, "disk").observe(300.0)
    record.histogram(defined.LOAD_DURATION, "cpu").observe(0.3)
    found = shown_to_routers(tmp_path)
    for transition, below, above, seconds in (
        ("disk_to_cpu", "0.25", "0.5", 0.3),
        ("cpu_to_gpu", "0.00025", "0.0005", 0.0003),
    ):
        name, labels = "vllm:lora_adapter_load_seconds", f"engine=0,transition={transition}"
        buckets = {
            float(key.split("le=")[1].split(",")[0].rstrip("}")): value
            for key, value in found.items()
            if key.startswith(f"{name}_bucket") and f"transition={transition}" in key
        }
        assert buckets[float(below)] == 0
        assert buckets[float(above)] == buckets[float("inf")] == 1
        assert found[f"{name}_count{{{labels}}}"] == 1
        assert found[f"{name}_sum{{{labels}}}"] == seconds
