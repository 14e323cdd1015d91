"""The batch plan: every token with an adapter in exactly one tile of its own slot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora_kernels import BatchPlan, PlanLayout
from multilora_kernels.plan import PLAN_LONGER, PLAN_PARTS


def tiles_of(plan: BatchPlan) -> list[tuple[int, list[int]]]:
    """Each tile's slot and tokens."""
    ints, layout = plan.buffer.tolist(), plan.layout
    order = ints[layout.order]
    return [
        (ints[layout.tile_slot][i], order[start : start + ints[layout.tile_length][i]])
        for i, start in enumerate(ints[layout.tile_start][: plan.tiles])
    ]


def assert_covers(plan: BatchPlan, token_slots: list[int]) -> None:
    seen: dict[int, int] = {}
    for slot, tokens in tiles_of(plan):
        assert 1 <= len(tokens) <= plan.layout.tile_rows
        for token in tokens:
            assert token not in seen
            seen[token] = slot
    assert seen == {t: s for t, s in enumerate(token_slots) if s >= 0}
    order = plan.buffer[plan.layout.order][: plan.tokens].tolist()
    assert sorted(order) == list(range(len(token_slots)))
    assert plan.rows == len(seen)
    assert plan.runs == len(set(seen.values()))
    assert plan.tiles <= plan.layout.max_tiles
    lengths = [len(tokens) for _, tokens in tiles_of(plan)]
    assert lengths == sorted(lengths, reverse=True)
    for depth in range(16):
        assert plan.buffer[PLAN_LONGER + depth] == sum(n > 16 * depth for n in lengths)
    for number, block in enumerate((16, 32, 64, 128, 256)):
        assert plan.buffer[PLAN_PARTS + number] == sum(-(-n // block) for n in lengths)


@given(
    token_slots=st.lists(st.integers(-1, 5), min_size=1, max_size=300),
    tile_rows=st.integers(1, 256),
)
@settings(max_examples=200, deadline=None)
def test_tiles_cover_any_batch(token_slots, tile_rows):
    assert_covers(BatchPlan.build(token_slots, 6, tile_rows=tile_rows), token_slots)


def test_a_run_keeps_its_tokens_in_order():
    plan = BatchPlan.build([2, 0, 2, -1, 2, 0], 3)
    assert tiles_of(plan) == [(2, [0, 2, 4]), (0, [1, 5])]


def test_the_buffer_keeps_its_address_and_forgets_the_last_batch():
    plan = BatchPlan(PlanLayout(max_tokens=64, max_loras=4))
    address = plan.buffer.data_ptr()
    for token_slots in ([0, 1, 2, 3] * 16, [1], [-1, -1], [3, -1, 3]):
        plan.update(np.array(token_slots))
        assert_covers(plan, token_slots)
        assert plan.buffer.data_ptr() == address


@pytest.mark.parametrize(
    "bad", [[0, 4], [-2, 0], [0, 9, -1], [1 << 16], [(1 << 16) - 1], [32767]], ids=str
)
def test_a_slot_out_of_range_is_refused_and_the_plan_unchanged(bad):
    plan = BatchPlan(PlanLayout(max_tokens=8, max_loras=4))
    plan.update(np.array([0, 1]))
    before = plan.buffer.clone()
    with pytest.raises(ValueError, match=r"between -1 and 3, got"):
        plan.update(np.array(bad))
    assert plan.buffer.equal(before)


@pytest.mark.parametrize("shape", [(3,), (2, 2), ()], ids=str)
def test_a_batch_is_a_row_of_tokens_no_longer_than_the_layout_has(shape):
    plan = BatchPlan(PlanLayout(max_tokens=2, max_loras=1))
    with pytest.raises(
        ValueError, match=rf"at most 2 tokens, got shape \[{', '.join(map(str, shape))}\]"
    ):
        plan.update(np.zeros(shape, int))


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("max_loras", 0), ("tile_rows", 257)]
)
def test_a_layout_out_of_bounds_is_refused(field, value):
    sizes = {"max_tokens": 8, "max_loras": 2, "tile_rows": 32} | {field: value}
    with pytest.raises(ValueError, match=f"{field} must be between"):
        PlanLayout(**sizes)


class TestSlotRuns:
    """The batch for kernels that know no tiles, behind the plan in the same buffer."""

    layout = PlanLayout(max_tokens=8, max_loras=3, slot_runs=True)

    def runs(self, plan: BatchPlan) -> dict[str, list[int]]:
        names = ("slot", "length", "start", "token_slot", "by_slot")
        return {name: plan.buffer[getattr(self.layout.runs, name)].tolist() for name in names}

    def test_tokens_are_sorted_by_slot_without_adapter_first(self):
        plan = BatchPlan(self.layout)
        plan.sends_slot_runs = True
        plan.update(np.array([2, -1, 0, 2, 2]))
        found = self.runs(plan)
        assert found["slot"] == [-1, 0, 2, -1]
        assert found["length"] == [1, 1, 3, 0]
        assert found["start"] == [0, 1, 2, 5, 0]
        assert found["token_slot"] == [2, -1, 0, 2, 2, -1, -1, -1]
        assert found["by_slot"][:5] == [1, 2, 0, 3, 4]

    def test_a_batch_without_adapters_has_no_runs(self):
        plan = BatchPlan(self.layout)
        plan.sends_slot_runs = True
        plan.update(np.array([2, 0]))
        plan.update(np.array([-1, -1]))
        found = self.runs(plan)
        assert found["slot"] == [-1] * 4
        assert found["length"] == [0] * 4
        assert found["token_slot"] == [-1] * 8

    def test_a_step_that_needs_none_sends_the_plan_alone(self):
        plan = BatchPlan(self.layout)
        empty = self.runs(plan)
        plan.update(np.array([2, -1, 0]))
        assert self.runs(plan) == empty
        assert plan.rows == 2
