"""Every backend against the float64 reference, over batches, ranks, shapes and dtypes."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multilora_kernels import (
    BatchPlan,
    PlanLayout,
    PreparedExpand,
    PreparedLinear,
    PreparedShrink,
    column_major,
    lora_expand,
    lora_linear,
    lora_shrink,
    native,
    reference,
)

from .problems import make_problem
from .tolerances import assert_close
from .triton.triton_problems import (
    DEVICE,
    assert_matches,
    poisoned_memory,
    problem_here,
    run,
    watched,
)

BACKENDS = ["native", "torch"]
everywhere = pytest.mark.parametrize(
    "backend", ["torch", "triton"] + ["native"] * (DEVICE == "cpu")
)
INTERLEAVED = [i % 6 - 1 for i in range(45)]
ZIPF = np.minimum(np.random.default_rng(3).zipf(1.5, 77) - 1, 7).tolist()


@pytest.fixture(autouse=True)
def _watched_and_poisoned() -> Iterator[None]:
    with poisoned_memory(), watched():
        yield


def test_the_native_backend_is_built_here():
    """Fails where the tests below would be about the fallback only."""
    native.load_library()


@everywhere
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_pair_of_dtypes(dtype, weight_dtype, backend):
    problem = problem_here(INTERLEAVED, widths=(24, 9), dtype=dtype, weight_dtype=weight_dtype)
    assert_matches(run(problem, backend), problem)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_mapping_ranks_and_shapes(backend, data):
    slots = data.draw(st.integers(1, 6), "slots")
    max_rank = data.draw(st.integers(1, 40), "max_rank")
    widths = tuple(data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4), "widths"))
    rank = st.integers(0, max_rank)
    problem = make_problem(
        data.draw(st.lists(st.integers(-1, slots - 1), min_size=1, max_size=120), "token_slots"),
        slots=slots,
        k=data.draw(st.integers(1, 70), "k"),
        widths=widths,
        max_rank=max_rank,
        ranks=data.draw(
            st.lists(
                st.lists(rank, min_size=slots, max_size=slots),
                min_size=len(widths),
                max_size=len(widths),
            ),
            "ranks",
        ),
        extra_dimension=data.draw(st.booleans(), "extra_dimension"),
        tile_rows=data.draw(st.sampled_from([1, 32, 128]), "tile_rows"),
    )
    options = {
        "offset": data.draw(st.integers(0, 3), "offset"),
        "add_inputs": data.draw(st.booleans(), "add_inputs"),
        "scale": data.draw(st.sampled_from([1.0, 0.25, -3.0]), "scale"),
    }
    if not options["add_inputs"]:
        problem.y[:] = float("nan")  # whatever is to be overwritten must not be read
        span = slice(options["offset"], options["offset"] + sum(widths))
        actual, expected = run(problem, backend, **options), problem.expected(**options)
        assert torch.isnan(actual[:, : span.start]).all()
        assert torch.isnan(actual[:, span.stop :]).all()
        assert_close(actual[:, span], expected[:, span], problem.magnitude(**options)[:, span])
    else:
        assert_matches(run(problem, backend, **options), problem, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prefill_of_8192_tokens(backend):
    slots = np.random.default_rng(1).integers(-1, 8, 8192)
    problem = make_problem(slots.tolist(), k=24, widths=(16, 8), max_rank=8, tile_rows=128)
    expected = problem.y.double()
    delta = torch.zeros_like(expected)
    for slot in range(8):  # the reference's loop over tokens, one adapter at a time
        rows, start = torch.from_numpy(slots == slot), 0
        for a, b, ranks in zip(problem.lora_a, problem.lora_b, problem.ranks, strict=True):
            r = int(ranks[slot])
            product = problem.x[rows].double() @ a[slot, 0, :r].double().T
            delta[rows, start : start + b.shape[-2]] = product @ b[slot, 0, :, :r].double().T
            start += b.shape[-2]
    magnitude = expected.abs() + delta.abs().mean()
    assert_close(run(problem, backend), expected + delta, magnitude)


@everywhere
def test_rows_without_adapter_and_columns_outside_the_span_keep_their_bits(backend):
    problem = problem_here(INTERLEAVED, margin=4)
    options = {"offset": 2, "scale": -0.5}
    actual = run(problem, backend, **options)
    assert_matches(actual, problem, **options)
    base = torch.tensor(problem.token_slots) < 0
    assert actual[base].equal(problem.y[base])
    assert actual[:, :2].equal(problem.y[:, :2])
    assert actual[:, 26:].equal(problem.y[:, 26:])


@everywhere
def test_rank_zero_leaves_its_slice_untouched(backend):
    problem = problem_here([0, 1, 0], slots=2, widths=(8, 8), ranks=[[0, 4], [4, 0]])
    actual = run(problem, backend)
    assert actual[0, :8].equal(problem.y[0, :8])
    assert actual[1, 8:16].equal(problem.y[1, 8:16])
    assert_matches(actual, problem)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_halves_match_the_reference(dtype, backend):
    problem = problem_here([*ZIPF, -1, -1], widths=(20, 12), k=600, dtype=dtype)
    shared = problem.ranks, problem.plan
    h = torch.empty(2, len(problem.token_slots), 16, device=DEVICE)
    lora_shrink(h, problem.x, problem.lora_a, *shared, scale=0.5, backend=backend)
    expected = reference.lora_shrink(
        problem.x.double(), problem.lora_a, problem.ranks, problem.token_slots, scale=0.5
    )
    assert_close(h, expected, expected.abs())
    y = problem.y.clone()
    lora_expand(y, h, problem.lora_b, *shared, backend=backend)
    assert_matches(y, problem, scale=0.5)


@everywhere
def test_activations_and_ranks_may_be_strided(backend):
    problem = problem_here(INTERLEAVED, widths=(16, 8))
    wide_x, wide_y = (torch.full((len(INTERLEAVED), 90), 7.0, device=DEVICE) for _ in range(2))
    wide_x[:, 5:45], wide_y[:, 9:36] = problem.x, problem.y
    weights = problem.lora_a, problem.lora_b, problem.ranks.T.contiguous().T
    lora_linear(wide_y[:, 9:36], wide_x[:, 5:45], *weights, problem.plan, backend=backend)
    assert_matches(wide_y[:, 9:36], problem)
    assert (wide_y[:, :9] == 7).all()
    assert (wide_y[:, 36:] == 7).all()


@everywhere
@pytest.mark.parametrize("tokens", [1, 10])
def test_tokens_of_the_plan_past_the_activations_are_skipped(tokens, backend):
    problem = problem_here(INTERLEAVED)
    expected, magnitude = problem.expected()[:tokens], problem.magnitude()[:tokens]
    problem.x, problem.y = problem.x[:tokens].clone(), problem.y[:tokens].clone()
    assert_close(run(problem, backend), expected, magnitude)
    product = expected - problem.y.double()
    overwritten = run(problem, backend, add_inputs=False)
    assert_close(overwritten[:, :24], product[:, :24], magnitude[:, :24])


@everywhere
def test_rows_past_the_plans_tokens_are_left_alone(backend):
    """Nor is their part of the plan looked for, which ends before."""
    problem = problem_here(INTERLEAVED)
    problem.plan = problem_here(INTERLEAVED[:10]).plan
    h = torch.full((1, 45, 16), 7.0, device=DEVICE)
    lora_shrink(h, problem.x, problem.lora_a, problem.ranks, problem.plan, backend=backend)
    assert (h[:, :10] != 7).all()
    assert (h[:, 10:] == 7).all()
    assert run(problem, backend)[10:].equal(problem.y[10:])
    y = problem.y.clone()
    options = {"add_inputs": False, "backend": backend}
    lora_expand(y, h, problem.lora_b, problem.ranks, problem.plan, **options)
    assert y[10:].equal(problem.y[10:])
    assert y.equal(run(problem, backend, add_inputs=False))


@pytest.mark.parametrize("by_column", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [56, 64])
@pytest.mark.parametrize("power", [1, 2], ids=["evenly-apart", "unevenly"])
def test_native_results_are_deterministic_and_do_not_depend_on_the_batch(
    power, k, dtype, by_column
):
    """A row alone, and in batches of any size and order, gets the same bits.

    Whole vectors of x are read where they lie if its rows are evenly apart, and gathered if not.
    """
    token_slots = [7 * i**power % 9 - 1 for i in range(61)]
    problem = make_problem(token_slots, widths=(48, 16, 16), k=k, max_rank=40, dtype=dtype)
    if by_column:
        problem.lora_b = [column_major(b).copy_(b) for b in problem.lora_b]
    whole = run(problem, "native")
    assert run(problem, "native").equal(whole)
    for rows in ([0], [1], [60], [5, 4], list(range(20, 33)), list(range(60, -1, -1))):
        part = make_problem(
            [token_slots[r] for r in rows], widths=(48, 16, 16), k=k, max_rank=40, dtype=dtype
        )
        part.x, part.y = problem.x[rows].clone(), problem.y[rows].clone()
        part.lora_a, part.lora_b, part.ranks = problem.lora_a, problem.lora_b, problem.ranks
        assert run(part, "native").equal(whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [None, [[1, 7, 8, 0], [9, 16, 17, 2]]], ids=["", "odd"])
@pytest.mark.parametrize(
    "token_slots", [[3], [2, 1, 2], [1] * 9, [1, 2, 3] * 5, [1] * 32, [1] * 33], ids=len
)
def test_native_results_do_not_depend_on_how_b_is_stored(token_slots, ranks, dtype):
    """Few rows stream whole columns, at most 2,048 at a time; more rows take blocks."""
    problem = make_problem(
        token_slots, slots=4, widths=(2100, 50), k=72, max_rank=40, ranks=ranks, dtype=dtype
    )
    by_row = run(problem, "native")
    assert_matches(by_row, problem)
    problem.lora_b = [column_major(b).copy_(b) for b in problem.lora_b]
    assert run(problem, "native").equal(by_row)


@pytest.mark.parametrize("by_column", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("token_slots", [[3], [2, 1, 2], [1] * 41], ids=len)
def test_bfloat16_is_summed_in_float32(token_slots, by_column):
    """Whatever the processor multiplies: a float32 output is as good as one of float32 inputs."""
    problem = make_problem(token_slots, widths=(70, 16), k=1537, max_rank=64, dtype=torch.bfloat16)
    problem.y = problem.y.float()
    if by_column:
        problem.lora_b = [column_major(b).copy_(b) for b in problem.lora_b]
    assert_matches(run(problem, "native"), problem)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_native_results_do_not_depend_on_the_thread_count(threads):
    problem = make_problem([0] * 300 + [1, 2, -1, 2] + [3] * 40, widths=(48, 16, 16))
    before = torch.get_num_threads()
    expected = run(problem, "native")
    try:
        torch.set_num_threads(threads)
        assert run(problem, "native").equal(expected)
    finally:
        torch.set_num_threads(before)


def test_bfloat16_stores_round_to_nearest_even_and_keep_infinities_and_nan():
    values = [1.00390625, 1.01171875, 3.3895314e38, float("inf"), float("-inf"), float("nan"), -0.0]
    problem = make_problem([0], slots=1, k=8, widths=(8,), ranks=[[1]], max_rank=1)
    problem.x = torch.tensor([[1.0] + [0.0] * 7])
    problem.lora_a = [torch.eye(1, 8).view(1, 1, 1, 8)]
    problem.lora_b = [torch.tensor([*values, 2.5]).view(1, 1, 8, 1)]
    problem.y = torch.empty(1, 11, dtype=torch.bfloat16)
    actual = run(problem, "native", add_inputs=False)[0, :7]
    expected = torch.tensor(values).to(torch.bfloat16)
    assert actual[~actual.isnan()].equal(expected[~expected.isnan()])
    assert actual.isnan().equal(expected.isnan())


BAD_CALLS = {
    "x-width": (lambda p: {"x": p.x[:, :-1]}, "x must have 40 columns"),
    "y-rows": (lambda p: {"y": p.y[:-1]}, "all activations must have the same tokens"),
    "y-width": (lambda p: {"y": p.y[:, :20]}, "y must have at least 24 columns"),
    "ranks-dtype": (lambda p: {"ranks": p.ranks.long()}, "ranks must be int32"),
    "ranks-shape": (lambda p: {"ranks": p.ranks[:, :-1]}, r"ranks must be int32 of shape \[1, 8\]"),
    "x-dtype": (lambda p: {"x": p.x.double()}, "x must be 2-D with contiguous rows in float32"),
    "x-dimensions": (lambda p: {"x": p.x[None]}, "x must be 2-D"),
    "x-device": (lambda p: {"x": p.x.to("meta")}, "must be on one device, found .*'x': 'meta'"),
    "plan-device": (
        lambda p: {"plan": BatchPlan(p.plan.layout, "meta")},
        "must be on one device, found .*'plan': 'meta'",
    ),
    "a-device": (lambda p: {"lora_a": [p.lora_a[0].to("meta")]}, r"lora_a\[0\] must .* on cpu"),
    "a-rows": (lambda p: {"lora_a": [column_major(p.lora_a[0])]}, r"lora_a\[0\] .*contiguous rows"),
    "a-dimensions": (
        lambda p: {"lora_a": [p.lora_a[0].repeat(1, 2, 1, 1)]},
        r"lora_a\[0\] must have shape \[8, rows, 40\] .or with a 1 after the slots",
    ),
    "b-slots": (lambda p: {"lora_b": [p.lora_b[0][:7]]}, r"lora_b\[0\] must have shape \[8, rows"),
    "b-strides": (
        lambda p: {"lora_b": [p.lora_b[0].repeat(1, 1, 2, 2)[..., ::2, ::2]]},
        r"lora_b\[0\] .*contiguous rows or columns",
    ),
    "b-dtype": (
        lambda p: {"lora_b": [p.lora_b[0].half()]},
        "lora_b must be torch.float32, as lora_a is, found torch.float16",
    ),
    "dtype": (
        lambda p: {"lora_a": [p.lora_a[0].double()], "lora_b": [p.lora_b[0].double()]},
        "lora_a must be float32, bfloat16 or float16, found torch.float64",
    ),
    "b-rank": (lambda p: {"lora_b": [p.lora_b[0][..., :-1]]}, r"lora_b\[0\] must have shape"),
    "many-slices": (
        lambda p: {
            "lora_a": p.lora_a * 17,
            "lora_b": p.lora_b * 17,
            "ranks": p.ranks.repeat(17, 1),
            "y": torch.zeros(2, 17 * 24),
        },
        "at most 16 slices, found 17",
    ),
    "slices": (lambda p: {"lora_b": []}, "lora_a and lora_b must have the same slices"),
    "offset": (lambda p: {"offset": -8}, "offset must not be negative, found -8"),
    "backend": (lambda p: {"backend": "cuda"}, "unknown backend 'cuda'"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_call_that_does_not_fit_is_refused_with_its_reason(change, message):
    problem = make_problem([0, 1])
    arguments = {
        name: getattr(problem, name) for name in ("y", "x", "lora_a", "lora_b", "ranks", "plan")
    }
    with pytest.raises(ValueError, match=message):
        lora_linear(**(arguments | change(problem)))


BAD_HALVES = {
    "x-columns": lambda x, h, y: (x[:, :-1], h, y),
    "y-columns": lambda x, h, y: (x, h, y[:, :23]),
    "h-slices": lambda x, h, y: (x, h.repeat(2, 1, 1), y),
    "h-rows": lambda x, h, y: (x, h[:, :-1], y),
    "h-columns": lambda x, h, y: (x, h[..., :-1], y),
    "h-strides": lambda x, h, y: (x, h.mT.contiguous().mT, y),
    "h-dtype": lambda x, h, y: (x, h.double(), y),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["call", "prepared"])
@pytest.mark.parametrize(
    ("half", "change"),
    [
        (half, change)
        for change in BAD_HALVES
        for half in ("shrink", "expand")
        if not change.startswith("y" if half == "shrink" else "x")
    ],
)
def test_half_a_product_that_does_not_fit_is_refused(half, change, prepared):
    problem = make_problem([0, 1, -1])
    x, h, y = BAD_HALVES[change](problem.x, torch.zeros(1, 3, 16), problem.y)
    a, b, ranks, plan = problem.lora_a, problem.lora_b, problem.ranks, problem.plan
    calls = {
        ("shrink", False): lambda: lora_shrink(h, x, a, ranks, plan),
        ("shrink", True): lambda: PreparedShrink(a, ranks, plan.layout)(h, x, plan),
        ("expand", False): lambda: lora_expand(y, h, b, ranks, plan),
        ("expand", True): lambda: PreparedExpand(b, ranks, plan.layout)(y, h, plan),
    }
    with pytest.raises(ValueError, match="found"):
        calls[half, prepared]()


@pytest.mark.parametrize("kind", [PreparedLinear, PreparedShrink, PreparedExpand])
def test_a_layer_is_prepared_for_weights_and_plans_that_fit(kind):
    problem = make_problem([0, 1, -1])
    of = {
        PreparedLinear: ((problem.lora_a, problem.lora_b), problem.y, problem.x),
        PreparedShrink: ((problem.lora_a,), torch.zeros(1, 3, 16), problem.x),
        PreparedExpand: ((problem.lora_b,), problem.y, torch.zeros(1, 3, 16)),
    }
    weights, out, given_ = of[kind]
    ranks, plan = problem.ranks, problem.plan
    prepared = kind(*weights, ranks, plan.layout)
    other = BatchPlan(PlanLayout(plan.layout.max_tokens, plan.layout.max_loras, 16))
    assert other.layout.size == plan.layout.size
    with pytest.raises(ValueError, match="expected a plan of"):
        prepared(out, given_, other)
    with pytest.raises(ValueError, match=f"a plan of {plan.layout.size} numbers; found"):
        prepared.run(out, given_, plan.buffer[:-1], plan.header)
    with pytest.raises(ValueError, match="ranks must be int32"):
        kind(*weights, ranks.long(), plan.layout)
    with pytest.raises(ValueError, match="slice"):
        kind(*([] for _ in weights), ranks, plan.layout)
