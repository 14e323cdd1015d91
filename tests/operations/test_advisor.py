"""The rules: constructed situations and the one right advice for each."""

import ast
import shlex
from dataclasses import replace

import pytest

from vllm_multilora.metrics.label_values import BLENDS, OTHER
from vllm_multilora.toolbox.advice.advisor import advise, merge_snippet, slots_needed
from vllm_multilora.toolbox.advice.findings import Finding, FindingCode
from vllm_multilora.toolbox.advice.observations import (
    HostMemoryUse,
    LoadTimes,
    Observations,
    SeenAdapter,
)

GIB = 2**30
ADAPTERS = tuple(SeenAdapter(f"customer-{i}", 16, "gpu" if i < 8 else "cpu") for i in range(10))
HEALTHY = Observations(
    window_s=300.0,
    slots=12,
    model="llama",
    max_rank=16,
    active=10,
    peak_requested=7,
    gpu_evictions=5,
    host=HostMemoryUse(adapters=10, bytes=1.0 * GIB, bytes_limit=4.0 * GIB),
    requests={adapter.name: 40.0 for adapter in ADAPTERS},
    finished=420.0,
    load_times=LoadTimes({100.0: 80.0, 250.0: 20.0}),
    adapters=ADAPTERS,
)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


def test_a_healthy_server_gets_no_advice():
    assert advise(HEALTHY) == []


@pytest.mark.parametrize(
    ("active", "peak", "needed"),
    [(0, 0, 1), (1, 0, 2), (5, 3, 6), (10, 0, 12), (11, 4, 14), (10, 11, 13), (100, 9, 120)],
)
def test_slots_are_the_active_adapters_and_a_fifth_or_the_burst_and_two(active, peak, needed):
    assert slots_needed(replace(HEALTHY, active=active, peak_requested=peak)) == needed


def test_more_active_adapters_than_slots():
    found = only(advise(replace(HEALTHY, slots=8, gpu_evictions=900)))
    assert found.code is FindingCode.MAX_LORAS_LOW
    assert found.change == "raise --max-loras from 8 to 12"
    assert "10 adapters active within 300 s, 7 at the same time; 3.00 adapters a second" in (
        found.seen
    )
    assert "20 %" in found.rule


def test_no_more_slots_are_requested_where_every_adapter_has_one():
    assert advise(replace(HEALTHY, slots=10, gpu_evictions=0)) == []
    assert advise(replace(HEALTHY, slots=10, gpu_evictions=1)) != []


def test_far_too_many_slots():
    found = only(advise(replace(HEALTHY, slots=64)))
    assert found.code is FindingCode.MAX_LORAS_HIGH
    assert found.change.startswith("lower --max-loras from 64 to 12")
    # A minute says nothing of those that come every other minute.
    assert advise(replace(HEALTHY, slots=64, window_s=60.0)) == []


def test_slots_that_change_hands_though_there_are_enough():
    found = only(advise(replace(HEALTHY, gpu_evictions=301)))
    assert found.code is FindingCode.EVICTIONS
    assert advise(replace(HEALTHY, gpu_evictions=300)) == []


def test_host_memory_that_is_too_small_in_bytes():
    host = HostMemoryUse(adapters=6, bytes=0.6 * GIB, bytes_limit=0.6 * GIB)
    found = only(advise(replace(HEALTHY, slots=12, host=host, cpu_evictions=400)))
    assert found.code is FindingCode.CPU_TIER_SMALL
    # 12 slots and a fifth are 15 adapters of 0.1 GiB.
    assert found.change == "raise --multilora-cpu-cache-gib from 0.60 to 1.50"


def test_host_memory_that_is_too_small_in_adapters():
    host = HostMemoryUse(adapters=12, bytes=GIB, adapters_limit=12)
    found = only(advise(replace(HEALTHY, host=host, cpu_evictions=2)))
    assert found.change == "raise --max-cpu-loras from 12 to 15"


@pytest.mark.parametrize(
    ("host_bytes", "advice"), [(0.4 * GIB, "the storage is slow"), (10 * GIB, "the files are big")]
)
def test_loads_over_half_a_second(host_bytes, advice):
    found = only(
        advise(
            replace(
                HEALTHY,
                load_times=LoadTimes({500.0: 10.0, 1000.0: 90.0}),
                host=HostMemoryUse(adapters=10, bytes=host_bytes),
            )
        )
    )
    assert found.code is FindingCode.SLOW_LOADS
    assert advice in found.change
    size, speed = ("41.0 MiB", "41.0 MiB/s") if host_bytes < GIB else ("1.00 GiB", "1.00 GiB/s")
    assert f"; an adapter has {size} on average, read at some {speed}" in found.seen
    assert "90 of 100 loads from disk took over 500 ms" in found.seen


def test_failing_loads():
    found = only(advise(replace(HEALTHY, failures={"gone": 3.0})))
    assert found.code is FindingCode.FAILING_LOADS
    assert "gone: 3" in found.seen


def test_one_adapter_with_nearly_all_traffic_is_to_be_merged():
    requests = {**HEALTHY.requests, "customer-0": 4000.0}
    found = only(advise(replace(HEALTHY, requests=requests, finished=4300.0)))
    assert found.code is FindingCode.MERGE
    assert "'customer-0'" in found.change
    assert "merge_and_unload()" in found.snippet
    compile(found.snippet, "snippet", "exec")


@pytest.mark.parametrize("name", ["x').run(", 'x").run(', "x\\", "$(touch x); `touch x`", "a b"])
def test_no_name_becomes_code(name):
    snippet = merge_snippet("base", name)
    texts = [
        node.value
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert texts.count(f"merged-{name}") == 2
    assert f"FOLDER OF {name}" in texts
    command = snippet.splitlines()[-1].removeprefix("# then: ")
    assert shlex.split(command)[2:] == [f"merged-{name}", "--served-model-name", name]


@pytest.mark.parametrize(
    "change",
    [
        {"requests": {"a": 19.0}, "finished": 19.0},
        {"requests": {"a": 4000.0}, "finished": 9000.0},
        {"requests": {"a": 50.0, OTHER: 4000.0}, "finished": 4050.0},
        {"requests": {"a": 50.0, BLENDS: 4000.0}, "finished": 4050.0},
    ],
    ids=["too few to tell", "the base model has more", "many behind __other__", "blends"],
)
def test_what_is_not_to_be_merged(change):
    codes = {finding.code for finding in advise(replace(HEALTHY, **change))}
    assert FindingCode.MERGE not in codes


def test_cold_adapters_in_memory_that_others_need():
    requests = {f"customer-{i}": 40.0 for i in range(8)}
    full = HostMemoryUse(adapters=10, bytes=3.9 * GIB, bytes_limit=4.0 * GIB)
    found = only(advise(replace(HEALTHY, requests=requests, host=full)))
    assert found.code is FindingCode.COLD
    assert "customer-8, customer-9" in found.change
    # In memory that nobody else needs they may stay.
    assert advise(replace(HEALTHY, requests=requests)) == []


def test_a_cold_adapter_with_a_pin_keeps_a_slot_from_others():
    adapters = (*ADAPTERS[1:], replace(ADAPTERS[0], pinned=True))
    requests = {name: count for name, count in HEALTHY.requests.items() if name != "customer-0"}
    found = only(advise(replace(HEALTHY, adapters=adapters, requests=requests)))
    assert found.code is FindingCode.COLD
    assert found.change.startswith("unload customer-0 (and take the pins back)")


def test_a_maximum_rank_far_above_the_ranks_in_use():
    found = only(advise(replace(HEALTHY, max_rank=128, has_all_ranks=True)))
    assert found.code is FindingCode.MAX_RANK_HIGH
    assert found.change.startswith("lower --max-lora-rank from 128 to 16: a slot takes 12%")
    assert found.seen == "all adapters have been read; their highest rank is 16"


def test_no_rank_is_advised_while_adapters_are_unread():
    """Metrics say nothing of adapters that nobody has asked for."""
    assert advise(replace(HEALTHY, max_rank=128)) == []


def test_nobody_tells_what_is_enough_for_adapters_that_are_not_seen():
    seen = replace(HEALTHY, max_rank=128, slots=128, has_all_ranks=True)
    assert len(advise(seen)) == 2
    assert advise(replace(seen, names_are_cut=True)) == []


def test_ranks_at_which_lora_no_longer_pays():
    adapters = (*ADAPTERS, SeenAdapter("huge", 256, "cpu"))
    requests = {**HEALTHY.requests, "huge": 1.0}
    found = only(advise(replace(HEALTHY, adapters=adapters, requests=requests, max_rank=256)))
    assert found.code is FindingCode.LARGE_RANK
    assert "huge" in found.change


def test_counts_behind_other_are_called_a_least():
    found = only(advise(replace(HEALTHY, slots=4, names_are_cut=True)))
    assert found.seen.startswith("at least 10 adapters")
