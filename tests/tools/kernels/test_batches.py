"""Batches for measurements: what the numbers in a specification promise is in the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tools.kernels.measure.batches import (
    LAYERS,
    MIXED_RANKS,
    BatchSpec,
    Layer,
    build,
    choose_slots,
)

SMALL = Layer("small", 32, (48, 16, 16))
SPEC = BatchSpec(SMALL, tokens=24, max_loras=8)


def test_layers_have_the_widths_of_llama():
    assert LAYERS["8b.qkv"] == Layer("8b.qkv", 4096, (4096, 1024, 1024))
    assert LAYERS["70b.qkv"].outputs == (8192, 1024, 1024)
    assert LAYERS["70b.gate_up"] == Layer("70b.gate_up", 8192, (28672, 28672))
    assert LAYERS["8b.down"] == Layer("8b.down", 14336, (4096,))
    assert len(LAYERS) == 8


def test_a_layer_is_scaled_evenly_or_not_at_all():
    assert LAYERS["8b.qkv"].scaled(16) == Layer("8b.qkv/16", 256, (256, 64, 64))
    assert SMALL.scaled(1) is SMALL
    with pytest.raises(ValueError, match="48 is not divisible by 32"):
        SMALL.scaled(32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"popularity": "some"}, "popularity must be one of one, uniform, zipf, distinct"),
        ({"max_rank": 32}, "ranks 'mixed' need 0 < rank <= max_rank 32"),
        ({"ranks": 65}, "ranks 65 need"),
        ({"active": 9}, "active must be from 0 to 8 slots"),
        ({"run_length": 0}, "run_length must be at least 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_specification_out_of_bounds_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SPEC, **change)


@pytest.mark.parametrize(
    ("popularity", "slots"),
    [("one", 1), ("distinct", 24), ("uniform", range(12, 24)), ("zipf", range(6, 20))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_popularity_decides_how_many_adapters_a_batch_has(popularity, slots):
    chosen = choose_slots(replace(SPEC, popularity=popularity, max_loras=24))
    found = len(set(chosen.tolist()))
    assert found in (slots if isinstance(slots, range) else [slots])


def test_zipf_prefers_few_adapters_and_uniform_none():
    many = replace(SPEC, tokens=20_000)
    shares = {
        popularity: np.sort(np.bincount(choose_slots(replace(many, popularity=popularity))))[::-1]
        / many.tokens
        for popularity in ("zipf", "uniform")
    }
    harmonic = sum(1 / k for k in range(1, 9))
    np.testing.assert_allclose(shares["zipf"], 1 / np.arange(1, 9) / harmonic, atol=0.02)
    np.testing.assert_allclose(shares["uniform"], 1 / 8, atol=0.02)


def test_slots_in_use_are_scattered_and_no_others_occur():
    spec = replace(SPEC, max_loras=64, active=8, popularity="distinct")
    slots = np.unique(choose_slots(spec))
    assert len(slots) == 8
    assert slots.max() - slots.min() > 8


def test_a_batch_may_have_no_adapter():
    batch = build(replace(SPEC, active=0))
    assert set(batch.token_slots.tolist()) == {-1}
    assert (batch.plan.rows, batch.plan.tokens) == (0, SPEC.tokens)


def test_the_tokens_of_a_request_are_neighbours():
    slots = choose_slots(replace(SPEC, run_length=10, popularity="distinct"))
    assert [len(set(run.tolist())) for run in np.split(slots, [10, 20])] == [1, 1, 1]
    assert len(set(slots.tolist())) == 3


def test_mixed_ranks_take_turns_by_slot():
    assert SPEC.slot_ranks().tolist() == [*MIXED_RANKS, *MIXED_RANKS]
    assert replace(SPEC, ranks=16).slot_ranks().tolist() == [16] * 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_have_vllms_shape_and_are_zero_past_the_rank(dtype):
    batch = build(SPEC, dtype=dtype)
    assert batch.ranks.tolist() == [SPEC.slot_ranks().tolist()] * 3
    assert batch.ranks.dtype == torch.int32
    for width, a, b in zip(SMALL.outputs, batch.lora_a, batch.lora_b, strict=True):
        assert (a.shape, a.dtype) == ((8, 1, 64, 32), dtype)
        assert (b.shape, b.dtype) == ((8, 1, width, 64), dtype)
        for slot, rank in enumerate(SPEC.slot_ranks().tolist()):
            assert a[slot, 0].any(dim=1).tolist() == [True] * rank + [False] * (64 - rank)
            assert b[slot, 0].any(dim=0).tolist() == [True] * rank + [False] * (64 - rank)


def test_the_plan_is_of_the_batch():
    batch = build(SPEC)
    assert (batch.plan.tokens, batch.plan.rows) == (24, 24)
    assert batch.plan.runs == len(set(batch.token_slots.tolist()))
    assert (batch.x.shape, batch.y.shape) == ((24, 32), (24, 80))


def test_a_seed_gives_the_same_batch_again_and_another_seed_another():
    one, again, other = build(SPEC, seed=3), build(SPEC, seed=3), build(SPEC, seed=4)
    assert one.x.equal(again.x)
    assert one.lora_b[2].equal(again.lora_b[2])
    assert one.token_slots.tolist() == again.token_slots.tolist() != other.token_slots.tolist()
    assert not one.x.equal(other.x)
