"""An engine's adapters, their ways between the tiers, and what is shown of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from tests.engine.fake_engine import Engine, lora, pack_info
from vllm_multilora.integration.worker_link.fill_link import Filled
from vllm_multilora.metrics.label_values import IDLE_S
from vllm_multilora.slots.events import Tier
from vllm_multilora.states import AdapterState
from vllm_multilora.store.protocol.messages import Totals

from .readings import recorder, shown

MIB = 1 << 20


@pytest.fixture
def engines(tmp_path: Path) -> Callable[..., Engine]:
    """Makes an engine with two slots, whose values lie in the test's folder."""

    def make(*, ranks: int = 1, **options) -> Engine:
        return Engine(2, ranks=ranks, recorder=recorder(tmp_path, "engine", **options))

    return make


@pytest.fixture
def engine(engines: Callable[..., Engine]) -> Engine:
    return engines()


def hear(engine: Engine, nbytes: int, adapters: int) -> None:
    """The store says what host memory holds; it has room for three adapters."""
    engine.store.inbox.append(Totals(nbytes, adapters, 100 * MIB, 3))
    engine.poll()


def unload(engine: Engine, number: int) -> None:
    engine.adapters.remove(number)
    engine.store.forgets()
    engine.poll()


def pick(folder: Path, *prefixes: str) -> dict[str, float]:
    """The values above 0 of metrics with these names, without their common beginning."""
    return {
        name.removeprefix("vllm:lora_").replace("engine=0,", "").replace("engine=0", ""): value
        for name, value in shown(folder).items()
        if value and any(name.startswith(f"vllm:lora_{prefix}{{") for prefix in prefixes)
    }


def info(folder: Path) -> list[str]:
    """The labels of all adapters that are shown, but for their engine's."""
    return [name.partition("lora_name=")[2][:-1] for name in pick(folder, "adapter_info")]


def test_an_empty_engine_shows_its_limits(tmp_path: Path, engine: Engine) -> None:
    hear(engine, 0, 0)
    assert {name: value for name, value in shown(tmp_path).items() if value} == {
        "vllm:lora_slots{engine=0}": 2,
        "vllm:lora_slots_free{engine=0}": 2,
        "vllm:lora_max_rank{engine=0}": 8,
        "vllm:lora_cache_bytes_limit{engine=0,tier=cpu}": 100 * MIB,
        "vllm:lora_cache_adapters_limit{engine=0,tier=cpu}": 3,
    }


def test_loads_evictions_and_look_ups_are_counted_where_they_happen(
    tmp_path: Path, engine: Engine
) -> None:
    engine.fill(1)
    engine.step(1)  # the same batch: no look-up
    engine.fill(2)
    for _ in range(2):
        engine.step(1)  # joins again, and has its slot
    engine.fill(3)  # takes the slot of 2
    engine.evict(2)
    engine.adapters.request_load(lora(4))
    engine.loaded(pack_info(4), was_read=False)
    engine.step(3)
    engine.bring(4)  # takes the slot of 1
    engine.filled()
    engine.step(4)
    by_name = {
        f"adapter_load_total{{lora_name=adapter {number},source={source}}}": 1
        for source, numbers in (("disk", (1, 2, 3)), ("cpu", (1, 2, 3, 4)))
        for number in numbers
    }
    evicted = (("gpu", 2), ("gpu", 1), ("cpu", 2))
    by_name |= {f"adapter_evict_total{{lora_name=adapter {n},tier={t}}}": 1 for t, n in evicted}
    assert pick(tmp_path, "adapter_load_total", "adapter_evict_total") == by_name
    assert pick(tmp_path, "cache_hits_total", "cache_misses_total") == {
        "cache_hits_total{tier=gpu}": 1,
        "cache_hits_total{tier=cpu}": 1,
        "cache_misses_total{tier=gpu}": 4,
        "cache_misses_total{tier=cpu}": 3,
    }
    assert pick(tmp_path, "adapter_load_duration_ms_sum", "batch_adapters_count") == {
        "adapter_load_duration_ms_sum{source=disk}": 300,
        "adapter_load_duration_ms_sum{source=cpu}": 400,
        "batch_adapters_count{}": 8,
    }


def test_gauges_follow_adapters_through_the_tiers(tmp_path: Path, engine: Engine) -> None:
    gauges = ("adapters_active", "slots_free", "cache_adapters", "cache_bytes")
    engine.host(1, nbytes=8 * MIB)
    engine.fill(2, nbytes=16 * MIB)
    hear(engine, 24 * MIB, 2)
    assert pick(tmp_path, *gauges) == {
        "adapters_active{}": 1,
        "slots_free{}": 1,
        "cache_adapters{tier=gpu}": 1,
        "cache_adapters{tier=cpu}": 2,
        "cache_bytes{tier=gpu}": 16 * MIB,
        "cache_bytes{tier=cpu}": 24 * MIB,
    }
    engine.adapters.slots_lost()
    unload(engine, 1)
    hear(engine, 16 * MIB, 1)
    assert pick(tmp_path, *gauges) == {
        "slots_free{}": 2,
        "cache_adapters{tier=cpu}": 1,
        "cache_bytes{tier=cpu}": 16 * MIB,
    }


def test_an_unloaded_adapter_gives_its_info_and_its_slot_back(
    tmp_path: Path, engine: Engine
) -> None:
    engine.fill(1)
    engine.adapters.pin(1)
    assert info(tmp_path) == ["adapter 1,pinned=true,rank=8,tier=gpu"]
    assert pick(tmp_path, "slots_free") == {"slots_free{}": 1}
    engine.adapters.drop(1)
    unload(engine, 1)
    assert info(tmp_path) == []
    assert pick(tmp_path, "slots_free") == {"slots_free{}": 2}


def test_an_adapter_in_a_slot_needs_no_host_memory_to_be_shown_there(
    tmp_path: Path, engine: Engine
) -> None:
    engine.fill(1, nbytes=8 * MIB)
    engine.evict(1)
    assert info(tmp_path) == ["adapter 1,pinned=false,rank=8,tier=gpu"]
    assert pick(tmp_path, "cache_bytes") == {"cache_bytes{tier=gpu}": 8 * MIB}
    engine.adapters.slots_lost()
    engine.poll()
    assert info(tmp_path) == ["adapter 1,pinned=false,rank=8,tier=disk"]


def test_an_evicted_adapter_that_is_not_known_is_counted_with_the_others(
    tmp_path: Path, engine: Engine
) -> None:
    engine.adapters.observer.evicted(Tier.CPU, 99)
    assert pick(tmp_path, "adapter_evict_total") == {
        "adapter_evict_total{lora_name=__other__,tier=cpu}": 1
    }


def test_a_new_version_takes_the_info_of_the_old_one_over(tmp_path: Path, engine: Engine) -> None:
    engine.host(1)
    engine.adapters.request_load(LoRARequest("adapter 1", 2, "/adapters/2"))
    engine.loaded(pack_info(2, rank=16))
    newest = ["adapter 1,pinned=false,rank=16,tier=cpu"]
    assert info(tmp_path) == newest
    engine.adapters.drop(1)
    unload(engine, 1)
    assert info(tmp_path) == newest


def test_adapters_that_never_came_take_no_label(
    tmp_path: Path, engines: Callable[..., Engine]
) -> None:
    engine = engines(most=1)
    for number in (1, 2):
        engine.adapters.request_load(lora(number))
        engine.failed()
    engine.host(3)
    assert info(tmp_path) == ["adapter 3,pinned=false,rank=8,tier=cpu"]
    assert pick(tmp_path, "adapter_load_total", "adapter_load_failures_total") == {
        "adapter_load_total{lora_name=adapter 3,source=disk}": 1,
        "adapter_load_failures_total{reason=invalid}": 2,
    }


def test_an_adapter_that_gets_the_place_of_an_idle_one_is_shown_where_it_is(
    tmp_path: Path, engines: Callable[..., Engine]
) -> None:
    now = 0.0
    engine = engines(most=1, clock=lambda: now)
    for number in (1, 2, 3):
        engine.host(number)
    assert info(tmp_path) == ["adapter 1,pinned=false,rank=8,tier=cpu"]
    assert pick(tmp_path, "adapter_load_total") == {
        "adapter_load_total{lora_name=adapter 1,source=disk}": 1,
        "adapter_load_total{lora_name=__other__,source=disk}": 2,
    }
    now += IDLE_S
    engine.adapters.request_load(lora(2, inplace=True))
    engine.loaded(pack_info(2), was_read=False)
    assert info(tmp_path) == ["adapter 2,pinned=false,rank=8,tier=cpu"]
    assert list(pick(tmp_path, "adapter_load_total")) == [
        "adapter_load_total{lora_name=__other__,source=disk}"
    ]


def test_a_new_version_in_the_same_slot_counts_with_its_own_bytes(
    tmp_path: Path, engine: Engine
) -> None:
    engine.fill(1, nbytes=8 * MIB)
    engine.idle()
    engine.adapters.request_load(lora(1, inplace=True))
    engine.loaded(pack_info(2, nbytes=16 * MIB))
    assert not engine.bring(1)
    assert pick(tmp_path, "cache_bytes") == {"cache_bytes{tier=gpu}": 16 * MIB}


def test_a_copy_is_counted_once_however_many_workers_make_it(
    tmp_path: Path, engines: Callable[..., Engine]
) -> None:
    engines(ranks=2).fill(1)
    assert pick(tmp_path, "adapter_load_total") == {
        "adapter_load_total{lora_name=adapter 1,source=disk}": 1,
        "adapter_load_total{lora_name=adapter 1,source=cpu}": 1,
    }


def test_what_was_in_memory_already_and_a_copy_that_was_not_made_are_no_loads(
    tmp_path: Path, engine: Engine
) -> None:
    """It was read for another server, say. While the engine sleeps, slots have no memory."""
    engine.adapters.request_load(lora(1))
    engine.loaded(pack_info(1), was_read=False)
    assert info(tmp_path) == ["adapter 1,pinned=false,rank=8,tier=cpu"]
    engine.bring(1)
    engine.workers.say(Filled(engine.workers.only().order, None))
    engine.poll()
    assert engine.adapters.state(1) is AdapterState.SLOT
    assert pick(tmp_path, "adapter_load_total") == {}
