"""The benchmark's grid at reduced sizes against the float64 reference, with an H100's blocks.

Popularities x ranks x layers, decode and prefill. Weights past a rank and all memory between the
halves are NaN, token counts are odd, and no kernel may touch what lies beside its tensors.
"""

import numpy as np
import pytest
import torch

from multilora_kernels import triton as backend
from multilora_kernels.triton.launch import Launch
from tools.kernels.measure.batches import LAYERS, POPULARITIES, choose_slots
from tools.kernels.measure.cases import CASES, RANKS, Case, Sizes

from .triton_problems import as_on_an_h100, assert_even, even_problem, poisoned_memory, run, watched

# What takes time here are programs, so wide outputs are divided by more, long inputs by less: those
# of the down projections stay long enough to be cut into parts. 70B layers by twice as much.
DIVISORS = {"qkv": 32, "o": 32, "gate_up": 128, "down": 16}
DECODE, PREFILL, PROMPT = 5, 139, 37
SLOTS, MAX_RANK = 4, 64
BASE_ROW = 2  # a token without adapter


@pytest.fixture(autouse=True)
def _watched_and_poisoned():
    with poisoned_memory(), as_on_an_h100(), watched():
        yield


def places(case: Case) -> tuple[int, int, int, int]:
    """Where the case lies on the axes: phase, layer, popularity, ranks."""
    return (
        ("decode", "prefill").index(case.phase),
        list(LAYERS).index(case.layer.name),
        POPULARITIES.index(case.popularity),
        RANKS.index(case.ranks),
    )


def is_quick(case: Case) -> bool:
    """Each layer once, each popularity and rank twice, each phase with each of the two."""
    phase, layer, popularity, ranks = places(case)
    return phase == layer // 4 and popularity == layer % 4 and ranks == (layer + phase) % 4


def grid() -> list:
    """The quick cases, and others in which any two axes meet in all ways."""
    return [
        pytest.param(case, id=case.name, marks=[] if is_quick(case) else pytest.mark.slow)
        for case in CASES
        if is_quick(case) or sum(places(case)) % 4 == 1
    ]


@pytest.mark.parametrize("case", grid())
def test_the_grid_matches_the_reference(case: Case):
    """Half of them in float16, and half overwrite an output full of NaN."""
    phase, layer, popularity, ranks = places(case)
    dtype = (torch.bfloat16, torch.float16)[(popularity // 2 + ranks) % 2]
    overwrites = (layer // 2 + popularity + phase) % 2 == 1
    model, _, kind = case.layer.name.partition(".")
    divisor = DIVISORS[kind] * (2 if model == "70b" else 1)
    spec = case.spec(Sizes(divisor, DECODE, PREFILL, PROMPT, SLOTS, MAX_RANK, dtype, 1))
    token_slots = choose_slots(spec).tolist()
    token_slots[BASE_ROW] = -1
    slices = len(spec.layer.outputs)
    problem = even_problem(
        token_slots,
        slots=SLOTS,
        k=spec.layer.inputs,
        widths=spec.layer.outputs,
        max_rank=MAX_RANK,
        ranks=[np.roll(spec.slot_ranks(), i).tolist() for i in range(slices)],
        dtype=dtype,
        tile_rows=128,
        margin=0,
    )
    expected = problem.expected(add_inputs=not overwrites)
    if overwrites:
        problem.y.fill_(float("nan"))
    assert_even(run(problem, add_inputs=not overwrites), expected)


def test_the_quick_part_has_every_value_of_every_axis():
    quick = [case for case in CASES if is_quick(case)]
    axes = zip(*map(places, quick), strict=True)
    assert [set(values) for values in axes] == [{0, 1}, set(range(8)), set(range(4)), set(range(4))]
    assert {case.phase for case in quick if case.ranks == "mixed"} == {"decode", "prefill"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("max_rank", "widths"),
    [
        pytest.param(16, (48, 33, 7), id="16"),
        pytest.param(64, (96, 40), id="64", marks=pytest.mark.slow),
    ],
)
def test_every_rank_in_one_batch(max_rank, widths, dtype):
    """Slot s has rank s + 1 in the first slice, another one in each of the others."""
    ranks = np.arange(1, max_rank + 1)
    problem = even_problem(
        [*reversed(range(max_rank)), -1, 3, max_rank - 1],
        slots=max_rank,
        k=200,
        widths=widths,
        max_rank=max_rank,
        ranks=[np.roll(ranks, 5 * i).tolist() for i in range(len(widths))],
        dtype=dtype,
        tile_rows=128,
    )
    assert_even(run(problem), problem.expected())


@pytest.mark.slow
@pytest.mark.parametrize("max_rank", [320, 512])
def test_a_long_prefill_of_high_ranks(max_rank, monkeypatch):
    """The longest blocks of 16-bit values, several blocks of ranks, ranks that end in any."""
    launched, start = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (launched.append(launch), start(launch)))
    tokens = 1101
    problem = even_problem(
        [slot for slot in (0, 3, -1, 1, 2) for _ in range(tokens // 5)] + [3],
        slots=4,
        k=160,
        widths=(512, 160),
        max_rank=max_rank,
        ranks=[[max_rank, 65, 1, max_rank - 3], [130, max_rank, 64, 0]],
        dtype=torch.bfloat16,
        tile_rows=128,
    )
    assert_even(run(problem), problem.expected())
    if backend.INTERPRETED:  # another card may want other blocks
        expand = launched[-1].constants
        assert (expand["BLOCK_M"], expand["BLOCK_N"], expand["BLOCK_R"]) == (64, 64, 64)
