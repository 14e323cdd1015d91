"""A base layer's products by weights that oneDNN packs, of few rows in C, against float64."""

import gc
from itertools import product

import pytest
import torch
from torch.nn.functional import linear

from multilora_kernels.native import packed_linear
from multilora_kernels.native.packed_linear import MAX_ROWS, PackedLinear, pack

from ..tolerances import assert_close
from .test_native_memory import guarded

HAS_AMX = torch.cpu._is_amx_tile_supported()  # then oneDNN packs bfloat16 for it
ALL_DTYPES = [t for t in (torch.float32, torch.bfloat16) if packed_linear._block_columns(t)]
DTYPES = [dtype for dtype in ALL_DTYPES if not (dtype is torch.bfloat16 and HAS_AMX)]
SHAPES = (64, 32), (192, 96), (576, 576)
ROWS = 0, 1, 2, 3, 4, 5, 6, 7, 13, 16, 63, 64, 65, 130

needs_avx512 = pytest.mark.skipif(not DTYPES, reason="the C code multiplies on AVX-512 alone")
needs_bf16 = pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="no AVX512-BF16, or AMX")
of_each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(weight: torch.Tensor) -> PackedLinear:
    found = pack(weight)
    assert found is not None
    return found


@needs_avx512
@of_each_type
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "plain"])
def test_products_are_those_of_float64(dtype: torch.dtype, has_bias: bool) -> None:
    for columns, k in SHAPES:
        weight, bias = random(columns, k, dtype=dtype), random(columns, dtype=dtype, seed=1)
        layer = packed(weight)
        for rows in ROWS:
            x = random(rows, k, dtype=dtype, seed=2)
            y = layer(x, None, bias if has_bias else None)
            assert y.dtype is dtype
            assert y.shape == (rows, columns)
            if rows:
                expected = linear(x.double(), weight.double(), bias.double() if has_bias else None)
                assert_close(y, expected, linear(x.double().abs(), weight.double().abs()))


@needs_avx512
@of_each_type
def test_rows_may_be_parts_of_longer_ones_and_have_more_dimensions(dtype: torch.dtype) -> None:
    layer, x = packed(random(128, 64, dtype=dtype)), random(6, 200, dtype=dtype, seed=1)
    plain = layer(x[:, 3:67].contiguous())
    assert torch.equal(layer(x[:, 3:67]), plain)
    assert torch.equal(layer(x[:, 3:67].reshape(2, 3, 64)), plain.view(2, 3, 128))
    columns = x[:, 3:67].T.contiguous().T  # not for C
    assert_close(layer(columns), plain.double(), plain.double().abs() + 8)


@needs_avx512
@of_each_type
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_rows_bits_depend_on_nothing_else(dtype: torch.dtype, threads: int) -> None:
    layer, x = packed(random(384, 576, dtype=dtype)), random(MAX_ROWS, 576, dtype=dtype, seed=1)
    alone = torch.cat([layer(row) for row in x.split(1)])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (2, 5, 6, 7, 16, 31, MAX_ROWS):
            assert torch.equal(layer(x[:rows]), alone[:rows])
            poisoned = x[:rows].clone()
            poisoned[1] = torch.nan
            y = layer(poisoned)
            assert y[1].isnan().all()
            assert torch.equal(y[0], alone[0])
            assert torch.equal(y[2:], alone[2:rows])
    finally:
        torch.set_num_threads(before)


@needs_avx512
@of_each_type
def test_weights_may_be_any_numbers(dtype: torch.dtype) -> None:
    weight = random(64, 64, dtype=dtype)
    weight[3, 5], weight[7, 0] = torch.nan, torch.inf
    y = packed(weight)(torch.ones(2, 64, dtype=dtype))
    assert y[:, 3].isnan().all()
    assert y[:, 7].isinf().all()
    others = [each for each in range(64) if each not in (3, 7)]
    assert y[:, others].isfinite().all()


@needs_avx512
def test_blocks_that_threads_cannot_share_are_left_to_onednn(monkeypatch) -> None:
    layer, x = packed(random(192, 64, dtype=torch.float32)), torch.ones(2, 64)
    plain = layer(x)
    monkeypatch.setattr(layer, "_multiply", lambda call: pytest.fail("C was called"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)  # for three blocks
    torch.testing.assert_close(layer(x), plain)


@needs_avx512
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "beginning"])
def test_nothing_beside_the_tensors_is_touched(at_end: bool) -> None:
    """Guards x and bias; the weights are oneDNN's, and y is PyTorch's."""
    for dtype, rows in product(DTYPES, (1, 6, 16)):
        layer, bias = packed(random(128, 96, dtype=dtype)), torch.ones(128, dtype=dtype)
        x = random(rows, 96, dtype=dtype)
        found = layer(guarded(x, at_end), None, guarded(bias, at_end))
        assert torch.equal(found, layer(x, None, bias))


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(100, 64),
        torch.zeros(64, 0),
        torch.zeros(0, 64),
        torch.zeros(64, 63, dtype=torch.bfloat16),
        torch.zeros(64, 64, dtype=torch.float16),
        torch.zeros(64, 64, dtype=torch.float64),
        torch.zeros(64, 64, 2),
        torch.zeros(64, 64, device="meta"),
    ],
    ids=lambda weight: f"{'x'.join(map(str, weight.shape))}-{weight.dtype}-{weight.device}",
)
def test_other_weights_are_not_packed(weight: torch.Tensor) -> None:
    assert pack(weight) is None


@needs_avx512
@of_each_type
def test_weights_that_onednn_packs_otherwise_are_not_taken(monkeypatch, dtype) -> None:
    weight, operators = random(128, 64, dtype=dtype), torch.ops.mkldnn
    reorder = operators._reorder_linear_weight
    for other in (weight.flip(1), weight[:64]):
        monkeypatch.setattr(packed_linear, "_expected", {})
        monkeypatch.setattr(
            operators, "_reorder_linear_weight", lambda _, rows, other=other: reorder(other, rows)
        )
        assert pack(weight) is None


@pytest.mark.skipif(not ALL_DTYPES, reason="the C code multiplies on AVX-512 alone")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("k", [32, 64, 576])
def test_pack_after_a_weight_of_zeros_multiplies_by_the_next_one(monkeypatch, dtype, k) -> None:
    """Zeros look alike in every order, so they say nothing of the order of the next weights."""
    monkeypatch.setattr(packed_linear, "_expected", {})
    first = pack(torch.zeros(128, k, dtype=dtype))
    weight, x = random(128, k, dtype=dtype), random(6, k, dtype=dtype, seed=1)
    layer = pack(weight)
    assert (layer is None) == (first is None)
    if layer is not None:
        expected = linear(x.double(), weight.double())
        assert_close(layer(x), expected, linear(x.double().abs(), weight.double().abs()))


@needs_avx512
def test_pack_of_zeros_in_another_order_is_refused(monkeypatch) -> None:
    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(packed_linear, "_expected", {})
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda w, rows: reorder(w.flip(0), rows)
    )
    assert pack(torch.zeros(128, 32)) is None


@needs_avx512
@pytest.mark.parametrize(
    ("x", "bias"),
    [
        (torch.zeros(2, 63), None),
        (torch.zeros(2, 64, dtype=torch.bfloat16), None),
        (torch.zeros(2, 64), torch.zeros(63)),
        (torch.zeros(2, 64), torch.zeros(64, dtype=torch.bfloat16)),
    ],
    ids=["columns", "type", "bias", "bias-type"],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer = packed(torch.zeros(64, 64))
    with pytest.raises(ValueError, match=r"expected x of shape \[\.\.\., 64\] and a bias of 64"):
        layer(x, None, bias)


@needs_avx512
@of_each_type
def test_compiled_code_calls_one_operator_and_holds_no_layer(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    bias = random(128, dtype=dtype, seed=1)
    layers = [packed(random(128, 64, dtype=dtype))]
    compiled = torch.compile(
        lambda x: layers[0](x, None, bias) * 2, backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (1, 3, 70):
        x = random(rows, 64, dtype=dtype, seed=rows)
        assert torch.equal(compiled(x), layers[0](x, None, bias) * 2)
    operator, number = torch.ops.multilora.packed_linear.default, layers[0]._number
    torch.library.opcheck(operator, (x, bias, number, 128))
    layers.clear()
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="must be kept as long as"):
        operator(x, bias, number, 128)
