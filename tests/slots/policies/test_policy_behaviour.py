"""Policies on whole traces: what their papers promise, and never more than the optimum."""

from dataclasses import replace
from functools import cache

import pytest

from vllm_multilora.slots.budget import GIB, MIB, CpuBudget
from vllm_multilora.slots.simulation.adapter_sizes import sizes_by_rank
from vllm_multilora.slots.simulation.replay import ServerShape, optimum, simulate
from vllm_multilora.slots.simulation.synthetic_traces import KINDS, Traffic, synthetic_trace

TRAFFIC = Traffic(requests=2_500, adapters=100, seed=1, scan_every=400)
SHAPE = ServerShape(slots=8, budget=CpuBudget(adapters=40), concurrency=4)
POLICIES = ("lru", "lfu", "slru", "gdsf")


@cache
def outcome(kind, policy, shape=SHAPE):
    trace = synthetic_trace(kind, TRAFFIC)
    return simulate(trace.requests, dict.fromkeys(trace.adapters, MIB), shape, policy)


@pytest.mark.parametrize("policy", ["lfu", "slru", "gdsf"])
@pytest.mark.parametrize("kind", ["zipf", "scan"])
def test_popularity_beats_recency_where_popularity_is_steady(kind, policy):
    assert outcome(kind, policy).gpu_hit_rate > outcome(kind, "lru").gpu_hit_rate + 0.02
    assert outcome(kind, policy).loads < outcome(kind, "lru").loads


@pytest.mark.parametrize("policy", POLICIES)
def test_only_lru_loses_its_working_set_to_a_scan(policy):
    """A working set of ten adapters asked for in turn, then one pass over ninety others."""
    working_set = [f"tenant-{i}" for i in range(10)]
    scan = [f"scanned-{i}" for i in range(90)]
    requests = [*working_set * 20, *scan]
    sizes = dict.fromkeys(requests, MIB)
    before = simulate(requests, sizes, SHAPE, policy)
    after = simulate([*requests, *working_set], sizes, SHAPE, policy)
    reloaded = after.loads - before.loads
    assert reloaded == (10 if policy == "lru" else 0)


def test_gdsf_serves_more_requests_from_memory_when_sizes_differ():
    trace = synthetic_trace("zipf", TRAFFIC)
    sizes = sizes_by_rank(trace.adapters, {8: 60, 16: 25, 128: 15}, mib_per_rank=5, seed=1)
    shape = ServerShape(slots=4, budget=CpuBudget(bytes=4 * GIB), concurrency=2)
    hits = {p: simulate(trace.requests, sizes, shape, p).cpu_hit_rate for p in POLICIES}
    assert hits["gdsf"] > hits["lru"] + 0.05
    assert hits["gdsf"] > hits["lfu"] + 0.01
    assert hits["gdsf"] <= optimum(trace.requests, sizes, shape).cpu_hit_rate


def test_lru_follows_tenants_around_the_clock_better_than_frequency_does():
    loads = {policy: outcome("daily", policy).loads for policy in POLICIES}
    assert loads["lru"] == min(loads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_no_policy_passes_the_optimum(kind):
    trace = synthetic_trace(kind, TRAFFIC)
    bound = optimum(trace.requests, dict.fromkeys(trace.adapters, MIB), SHAPE)
    for policy in POLICIES:
        found = outcome(kind, policy)
        assert bound.gpu_hit_rate >= found.gpu_hit_rate > 0.5 * bound.gpu_hit_rate
        assert bound.cpu_hit_rate >= found.cpu_hit_rate > 0.5 * bound.cpu_hit_rate
        assert bound.compulsory <= bound.loads <= found.loads


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_for_everything_each_adapter_moves_once(policy):
    shape = replace(SHAPE, slots=100, budget=CpuBudget())
    found = outcome("zipf", policy, shape)
    distinct = len(synthetic_trace("zipf", TRAFFIC).adapters)
    assert found.loads == found.activations == distinct
    assert found.cpu_evictions == found.gpu_evictions == 0


def test_an_adapter_keeps_its_slot_when_its_host_copy_is_evicted():
    """Host memory is a way into the slots: with room for one, two adapters still keep theirs."""
    shape = ServerShape(slots=2, budget=CpuBudget(bytes=MIB), concurrency=2)
    found = simulate("ababab", dict.fromkeys("ab", MIB), shape, "lru")
    assert (found.loads, found.cpu_evictions, found.gpu_hits) == (2, 1, 4)
