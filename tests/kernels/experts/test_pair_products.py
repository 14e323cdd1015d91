"""Adapters of experts by the Triton kernels, against the specification in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora_kernels import triton as backend
from multilora_kernels.experts import ACTIVATIONS, pair_products
from multilora_kernels.experts.pair_products import PairProducts
from tools.kernels.measure.counted.interpreter import observe

from ..triton.triton_problems import DEVICE, poisoned_memory, watched
from .expert_problems import ExpertProblem, make_experts
from .test_expert_products import MIXED, assert_close

interpreted = pytest.mark.skipif(
    not backend.INTERPRETED, reason="looks at memory that the interpreter shares"
)


@pytest.fixture(autouse=True)
def _watched_and_poisoned():
    with poisoned_memory(), watched():
        yield


def computed(problem: ExpertProblem, places: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's result: the experts' own products by PyTorch, adapters by the kernels."""
    x, experts = problem.x.to(DEVICE), problem.experts.to(DEVICE)
    w13, w2 = problem.w13.to(DEVICE), problem.w2.to(DEVICE)
    adapters, weights = problem.adapters, problem.weights.to(DEVICE)
    first, second = (
        PairProducts([each.to(DEVICE) for each in a], [each.to(DEVICE) for each in b], False)
        for a, b in ((adapters.w13_a, adapters.w13_b), ([adapters.w2_a], [adapters.w2_b]))
    )
    first.ranks.copy_(problem.w13_ranks)
    second.ranks.copy_(problem.w2_ranks)
    token_slots = torch.tensor(problem.token_slots, dtype=torch.int32, device=DEVICE)
    pairs, top_k = first.sort(experts, token_slots, places), experts.size(1)
    gate_up = torch.einsum("tk,teok->teo", x.float(), w13[experts.long()].float()).flatten(0, 1)
    first.add(gate_up, x, pairs, top_k)
    h = ACTIVATIONS[problem.activation](gate_up).to(x.dtype)
    y = torch.einsum("ti,toi->to", h.float(), w2[experts.long()].flatten(0, 1).float())
    y *= weights.reshape(-1, 1)
    second.add(y, h, pairs, top_k, weights)
    return y.view(*experts.shape, -1).sum(1).to(x.dtype).cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["two-slices", "fused"])
@pytest.mark.parametrize("by_column", [True, False], ids=["columns", "rows"])
def test_rows_with_and_without_adapters_are_what_the_specification_says(dtype, fused, by_column):
    problem = make_experts(MIXED, dtype=dtype, fused=fused, by_column=by_column)
    assert_close(computed(problem), problem.expected())


@settings(max_examples=12, deadline=None)
@given(
    token_slots=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_any_distribution_of_pairs_is_what_the_specification_says(
    token_slots, experts, top_k, seed
):
    problem = make_experts(
        token_slots, experts=max(experts, top_k), top_k=top_k, seed=seed, max_rank=4
    )
    assert_close(computed(problem), problem.expected())


def test_a_long_step_is_computed_in_parts(monkeypatch):
    problem = make_experts([row % 5 - 1 for row in range(70)], top_k=3)
    monkeypatch.setattr(pair_products, "MAX_PAIRS", 64)  # 21 tokens at a time
    assert_close(computed(problem), problem.expected())


def test_experts_of_another_worker_are_left_to_it():
    """A worker holds some experts; the others' pairs have no adapter here."""
    problem = make_experts(MIXED, experts=6)
    y = torch.ones(2 * len(MIXED), 64)
    weights = [each[:, 2:5].contiguous() for each in (problem.adapters.w2_a, problem.adapters.w2_b)]
    products = PairProducts(*([each.to(DEVICE)] for each in weights), False)
    products.ranks.copy_(problem.w2_ranks[..., 2:5])
    places = torch.tensor([-1, -1, 0, 1, 2, -1], device=DEVICE)
    slots = torch.tensor(MIXED, dtype=torch.int32, device=DEVICE)
    out, x = y.to(DEVICE), torch.randn(len(y), 48)
    products.add(out, x.to(DEVICE), products.sort(problem.experts.to(DEVICE), slots, places), 2)
    for pair, expert in enumerate(problem.experts.flatten().tolist()):
        slot = MIXED[pair // 2]
        if slot >= 0 and 2 <= expert < 5:
            rank = int(problem.w2_ranks[0, slot, expert])
            a, b = problem.adapters.w2_a[slot, expert], problem.adapters.w2_b[slot, expert]
            y[pair] += b[:, :rank] @ (a[:rank] @ x[pair])
    torch.testing.assert_close(out.cpu(), y)


def test_apart_from_the_base_products_pairs_without_adapters_get_zeros():
    problem = make_experts([0, -1, 1])
    adapters = problem.adapters
    products = PairProducts([adapters.w2_a.to(DEVICE)], [adapters.w2_b.to(DEVICE)], False)
    products.ranks.fill_(0)
    slots = torch.tensor(problem.token_slots, dtype=torch.int32, device=DEVICE)
    y = torch.full((6, 64), float("nan"), device=DEVICE)
    pairs = products.sort(problem.experts.to(DEVICE), slots)
    products.add(y, torch.ones(6, 48, device=DEVICE), pairs, 2, add_inputs=False)
    assert not y.any()


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    token_slots=st.lists(st.integers(-1, 2), min_size=1, max_size=50),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_tiles_hold_each_adapted_pair_once(token_slots, top_k, seed):
    problem = make_experts(token_slots, experts=4, top_k=top_k, slots=3, seed=seed)
    products = PairProducts([problem.adapters.w2_a], [problem.adapters.w2_b], False)
    [plan] = products.sort(problem.experts, torch.tensor(token_slots, dtype=torch.int32))
    slots = np.repeat(token_slots, top_k)
    expected = np.where(slots >= 0, slots * 4 + problem.experts.flatten().numpy(), -1)
    pairs, rows, _, tiles = plan[:4].tolist()
    assert (pairs, rows) == (len(slots), int((slots >= 0).sum()))
    assert plan[8:13].tolist() == [tiles] * 5
    layout = pair_products.plans.PlanLayout(pair_products.MAX_PAIRS, 12, 16)
    order = plan[layout.order][:pairs].tolist()
    assert sorted(order) == list(range(pairs))
    seen = []
    for slot, start, length in plan[32:][: 4 * tiles].view(-1, 4)[:, :3].tolist():
        assert 0 < length <= 16
        assert (expected[order[start : start + length]] == slot).all()
        seen += order[start : start + length]
    assert sorted(seen) == np.flatnonzero(slots >= 0).tolist()
    found, counts = np.unique(expected[expected >= 0], return_counts=True)
    assert tiles == sum(-(-counts // 16)), found


class _Read:
    """Counts the bytes that programs load, each address once for a launch, and the programs."""

    def __init__(self) -> None:
        self.bytes = self.programs = 0
        self._seen: list[np.ndarray] = []

    def begin_launch(self, kernel, tensors) -> None:
        pass

    def begin_program(self) -> None:
        self.programs += 1

    def access(self, addresses, item_size, store) -> None:
        if not store:
            self._seen.append(addresses)
            self._item = item_size

    def end_launch(self) -> None:
        if self._seen:
            self.bytes += len(np.unique(np.concatenate(self._seen))) * 4
        self._seen = []


@interpreted
def test_work_follows_pairs_and_ranks_whatever_the_slots_and_experts():
    """As many pairs, of as many experts and slots, in a small layer and in a large one."""

    def read(slots: int, experts: int, max_rank: int) -> _Read:
        problem = make_experts([0, 1] * 4, slots=slots, experts=experts, max_rank=max_rank)
        a, b = (each.nan_to_num() for each in (problem.adapters.w2_a, problem.adapters.w2_b))
        products = PairProducts([a], [b], False)
        products.ranks.fill_(8)
        chosen = torch.tensor([[0, 1], [2, 3]] * 4, dtype=torch.int32)
        counts = _Read()
        with observe(counts):
            pairs = products.sort(chosen, torch.tensor([0, 1] * 4, dtype=torch.int32))
            products.add(torch.zeros(16, 64), torch.ones(16, 48), pairs, 2)
        return counts

    small, large = read(4, 4, 8), read(16, 64, 32)
    assert large.bytes <= 1.1 * small.bytes
    assert large.programs == small.programs
