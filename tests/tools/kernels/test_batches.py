"""Batches for measurements: what the numbers in a specification promise is in the batch."""

from dataclasses import replace

import pytest
import torch

from tools.kernels.measure.batches import (
    LAYERS,
    BatchSpec,
    Layer,
    build,
    choose_slots,
)

SMALL = Layer("small", 32, (48, 16, 16))
SPEC = BatchSpec(SMALL, tokens=24, max_loras=8)


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


def test_a_seed_gives_the_same_batch_again_and_another_seed_another():
    one, again, other = build(SPEC, seed=3), build(SPEC, seed=3), build(SPEC, seed=4)
    assert one.x.equal(again.x)
    assert one.lora_b[2].equal(again.lora_b[2])
    assert one.token_slots.tolist() == again.token_slots.tolist() != other.token_slots.tolist()
    assert not one.x.equal(other.x)
