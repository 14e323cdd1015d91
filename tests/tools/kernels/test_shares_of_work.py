"""Programs share the work there is: few are idle, neighbours are read once, B in whole sectors.

Counted in Triton's interpreter with the grids of an H100.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from multilora_kernels import PreparedLinear, lora_linear
from multilora_kernels import triton as backend
from multilora_kernels.plan import PLAN_PARTS
from multilora_kernels.triton.launch import DeviceFacts, Launch
from tools.kernels.measure.batches import LAYERS, BatchSpec, Layer, LayerBatch, build
from tools.kernels.measure.contenders import Multilora, by_column
from tools.kernels.measure.counted.counting import Work, count_work
from tools.kernels.measure.counted.interpreter import launched_as_on

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not backend.INTERPRETED, reason="here these kernels are compiled, not interpreted"
    ),
]
H100 = DeviceFacts("sm_90", 132, pdl=False)
SMALL = Layer("small", 512, (2048, 512, 512))


def counted(batch: LayerBatch, facts: DeviceFacts = H100) -> Work:
    weights = batch.lora_a, batch.lora_b, batch.ranks
    with launched_as_on(facts):
        linear = PreparedLinear(*weights, batch.plan.layout, backend="triton")
        return count_work(lambda: linear(batch.y, batch.x, batch.plan), batch)


def assert_busy(work: Work) -> None:
    assert [launch.kernel for launch in work.launches] == ["shrink_kernel", "expand_kernel"]
    for launch in work.launches:
        assert launch.exited <= 0.1 * launch.programs, launch


def test_few_programs_are_idle_where_ranks_are_low_and_slots_mostly_unused():
    """32 tokens of 8 adapters of rank 16, in 64 slots of rank 64; qkv of Llama 3 8B."""
    spec = BatchSpec(LAYERS["8b.qkv"], 32, "distinct", 16, max_loras=64, active=8)
    batch = build(spec, dtype=torch.float16)
    assert_busy(counted(batch))


def test_no_part_is_empty_where_one_adapter_has_many_tokens_and_others_have_one():
    spec = BatchSpec(Layer("small", 512, (512,)), 256, "distinct", 16, 128, 16)
    token_slots = np.array([0] * 129 + list(range(1, 128)))
    batch = replace(build(spec, dtype=torch.float16), token_slots=token_slots)
    batch.plan.update(token_slots)
    parts_of_32_rows = int(batch.plan.buffer[PLAN_PARTS + 1])
    assert parts_of_32_rows == 4 + 1 + 127
    assert_busy(counted(batch))


def test_what_neighbouring_columns_share_is_read_at_most_a_third_as_often_as_by_each():
    """64 adapters of rank 8 with one token each, on a card of 16 multiprocessors."""
    batch = build(BatchSpec(SMALL, 64, "distinct", 8), dtype=torch.float16)
    work = counted(batch, replace(H100, processors=16))
    column_blocks = 64 * sum(SMALL.outputs) // 64
    planes = 512 // 256
    assert work.traffic["intermediate"].loaded <= column_blocks * planes * 8 * 4 / 3
    a_block = 12 + 4 + 4 + 8  # its tile's record, token and rank; two numbers of the header
    assert work.traffic["metadata"].loaded <= column_blocks * a_block / 3


def test_columns_of_a_low_rank_are_read_in_whole_sectors():
    """At rank 8 in 64 columns a row has 16 bytes, half a sector; a column is one piece."""
    batch = build(BatchSpec(SMALL, 64, "distinct", 8), dtype=torch.float16)
    rows, columns = (counted(b).traffic["weights"] for b in (batch, by_column(batch)))
    of_b = 64 * 8 * sum(SMALL.outputs) * 2
    of_a = 64 * 8 * SMALL.inputs * len(SMALL.outputs) * 2
    assert columns.sectors == columns.touched == rows.touched == of_a + of_b
    assert rows.sectors == rows.touched + of_b


def test_nothing_comes_between_the_launches_of_a_layer(monkeypatch):
    """Else it, and not the first half, would be what the second half may overlap with."""
    batch = build(BatchSpec(Layer("small", 1024, (64,)), 300, max_loras=4), dtype=torch.float16)
    seen: list[str] = []
    empty = torch.empty

    def allocate(*arguments, **named):
        seen.append("memory")
        return empty(*arguments, **named)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(Launch, "run", lambda launch: seen.append("launch"))
    monkeypatch.setattr("multilora_kernels.triton.expand.pays_before_expand", lambda *_: True)
    weights = batch.lora_a, batch.lora_b, batch.ranks
    prepared = Multilora().prepare(batch)
    for call in (
        lambda: lora_linear(batch.y, batch.x, *weights, batch.plan, backend="triton"),
        prepared,
        prepared,
    ):
        seen.clear()
        call()
        assert "memory" in seen
        launches = seen[seen.index("launch") :]
        assert len(launches) >= 2
        assert set(launches) == {"launch"}
