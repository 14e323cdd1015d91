"""The simulated engine, step by step: a step takes 1 s, each token of a prompt 10 ms more, each
generated token 100 ms; a request is 0.5 s on its way; an adapter of 8 MiB is read in 2 s (4 beside
steps) and copied in 1, for which no step waits.
"""

import time

import pytest
from msgspec.structs import replace

from vllm_multilora.slots.budget import MIB, CpuBudget
from vllm_multilora.slots.simulation.replay import ServerShape
from vllm_multilora.slots.simulation.traces import LONGEST_S
from vllm_multilora.toolbox.capacity.served import PlannedServer, Request
from vllm_multilora.toolbox.capacity.simulated_engine import Engine
from vllm_multilora.toolbox.capacity.step_cost import TERMS

from . import calibrations

LOADS = replace(calibrations.LOADS, s_per_mib=0.125, beside_s_per_mib=0.25, copy_s_per_mib=0.0625)
COSTS = calibrations.calibration(loads=LOADS)


def only_steps(loads=None, **seconds):
    """A calibration in which steps take nothing but these seconds, and requests nothing else."""
    step_s = dict.fromkeys(TERMS, 0.0) | seconds
    return replace(COSTS, step_s=step_s, request_s=0, request_beside_s=0, loads=loads)


def serve(*requests, slots=2, places=8, batch=4, step_tokens=64, costs=COSTS, sizes=None):
    server = PlannedServer(ServerShape(slots, CpuBudget(adapters=places), batch), step_tokens)
    engine = Engine(server, costs, sizes or [8 * MIB] * 8)
    return engine.serve([Request(*request) for request in requests])


def test_a_request_alone():
    served = serve((0, None, 10, 3))
    assert served.first_token_s == pytest.approx([0.5 + 1.2])
    assert served.steps == [(pytest.approx(s), rows) for s, rows in ((1.2, 0), (1.1, 1), (1.1, 1))]
    assert served.end_s == pytest.approx(0.5 + 1.2 + 1.1 + 1.1)
    assert served.most_context == 12  # the last token is never computed


def test_a_prompt_is_computed_in_pieces_of_a_step():
    served = serve((0, None, 20, 1), step_tokens=8)
    assert [s for s, _ in served.steps] == pytest.approx([1.08, 1.08, 1.14])
    assert served.first_token_s == pytest.approx([0.5 + 3.3])


def test_those_who_generate_go_before_prompts():
    """The second step has room for 7 tokens beside the one that is generated."""
    served = serve((0, None, 1, 5), (0, None, 17, 1), step_tokens=8)
    assert [s for s, _ in served.steps] == pytest.approx([1.18, 1.17, 1.23, 1.1, 1.1])
    assert served.first_token_s == pytest.approx([0.5 + 1.18, 0.5 + 1.18 + 1.17 + 1.23])


def test_who_comes_during_a_step_waits_for_its_end():
    served = serve((0, None, 10, 2), (0.1, None, 10, 1))
    assert served.first_token_s == pytest.approx([1.7, 1.7 + 1.3 - 0.1])


def test_on_its_way_beside_a_step_a_request_may_miss_the_next_one():
    """Steps begin at 0.5, 1.7 and 2.8: who is sent at 0.9 would reach the second in 0.5 s."""
    busy = replace(COSTS, request_beside_s=1.0)
    for costs, begins in ((COSTS, 1.7), (busy, 2.8)):
        served = serve((0, None, 10, 3), (0.9, None, 10, 1), costs=costs)
        assert served.first_token_s[1] == pytest.approx(begins + 1.3 - 0.9)


def test_attention_looks_at_all_tokens_before():
    costs = only_steps(prompt_pair=1.0, context_token=1.0)
    served = serve((0, None, 4, 3), batch=1, step_tokens=3, costs=costs)
    assert [s for s, _ in served.steps] == [1 + 2 + 3, 4, 5, 6]


def test_each_adapter_of_a_batch_is_read_once_and_multiplies_each_of_its_tokens():
    costs = only_steps(LOADS, adapters_at_all=1000.0, adapter_mib=100.0, adapted_token_mib=1.0)
    three = ((0, 0, 5, 2), (0, 0, 5, 2), (0, 1, 5, 2))
    served = serve(*three, costs=costs, sizes=[2 * MIB, 4 * MIB])
    # The first adapter is there first: it shares its time with the second one's load.
    assert [s for s, _ in served.steps] == [1220, 1204 + 400 + 5 * 4, 1404]


def test_a_cold_adapter_of_an_idle_engine():
    served = serve((0, 0, 10, 1))
    assert served.first_token_s == pytest.approx([0.5 + 2 + 1 + 1.2])
    assert (served.loads, served.activations) == (1, 1)
    assert (served.gpu_hits, served.cpu_hits) == (0, 0)


def test_a_cold_adapter_beside_a_request_that_generates():
    """Read from 0.5 to 4.5, found at 5.0, back at 5.5, copied from 6.1 to 7.1, found at 7.2."""
    served = serve((0, None, 10, 10), (0, 0, 10, 1))
    assert served.first_token_s == pytest.approx([1.7, 7.2 + 1.3])


def test_loads_share_the_machine_and_two_are_read_at_once():
    """Two in 4 s; the third in the idle second of the copies, 1.4 s of a step, 0.3 s after it."""
    served = serve((0, 0, 10, 1), (0, 1, 10, 1), (0, 2, 10, 1), slots=4)
    assert served.loads == 3
    both = 0.5 + 4 + 1 + 1.4
    assert served.first_token_s == pytest.approx([both, both, both + 0.3 + 1 + 1.2])


def test_hits_and_what_leaves_a_slot_are_those_of_the_policy():
    served = serve((0, 0, 10, 1), (100, 1, 10, 1), (200, 0, 10, 1), (300, 0, 10, 1), slots=1)
    assert (served.loads, served.activations) == (2, 3)
    assert (served.gpu_hits, served.cpu_hits) == (1, 2)
    # A slot is spared as soon as a step has gone by without its adapter.
    copied, there = served.first_token_s[2:]
    assert copied == pytest.approx(0.5 + 0.001 + 1 + 1.2)
    assert there == pytest.approx(0.5 + 1.2)


def test_host_memory_without_room_has_loads_wait_for_a_lease():
    """With one place the second adapter is read when the first one has been copied."""
    served = serve((0, 0, 10, 1), (0, 1, 10, 1), slots=1, places=1)
    assert served.loads == 2
    first = 0.5 + 2 + 1 + 1.2
    assert served.first_token_s[0] == pytest.approx(first)
    # Read beside that step: 1.2 s of it count as 0.6. The slot is spared when a step has gone by.
    assert served.first_token_s[1] == pytest.approx(first + 2 - 0.6 + 0.001 + 1 + 1.2)


def test_more_adapters_than_slots_take_turns_and_all_are_served():
    requests = [(n * 0.01, n % 8, 10, 4) for n in range(64)]
    served = serve(*requests, slots=2, places=8)
    assert all(seconds > 0 for seconds in served.first_token_s)
    assert served.activations >= 8


def test_late_in_a_trace_idle_time_passes_too(monkeypatch):
    """Added to so large a number, what a load still needs in the end is rounded away."""
    late, idle, idled = float(LONGEST_S), Engine._idle, []
    costs = replace(COSTS, loads=replace(LOADS, fixed_s=0.7))

    def counted(engine, until):
        idled.append(until)
        assert len(idled) < 5_000
        idle(engine, until)

    monkeypatch.setattr(Engine, "_idle", counted)
    soon, then = (
        serve((0, None, 10, 1), (at, 0, 10, 1), (at, 1, 10, 1), slots=1, costs=costs)
        for at in (100, late)
    )
    assert then.first_token_s == pytest.approx(soon.first_token_s, abs=0.001)


def test_ten_thousand_requests_take_seconds_and_come_out_the_same():
    requests = [(n * 0.8, n * 7919 % 40, 50, 20) for n in range(10_000)]
    begin = time.process_time()
    served = serve(*requests, slots=8, places=32, batch=16, step_tokens=512, sizes=[2 * MIB] * 40)
    assert time.process_time() - begin < 20  # one or two, on a calm machine
    again = serve(*requests, slots=8, places=32, batch=16, step_tokens=512, sizes=[2 * MIB] * 40)
    assert served == again
