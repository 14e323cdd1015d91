"""With AMX a row keeps its numbers to itself. Real vLLM kernels, without an engine."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import linear
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_multilora.integration import kv_blocks
from vllm_multilora.integration.worker.base_layers import base_products

ROWS, COLUMNS = 300, 176
"""Not for the kernels of vLLM's own that only run with AMX, and five tiles and a half."""
ATTENTION = torch.bfloat16, 128, 64, "auto"


def layer_of(dtype: torch.dtype) -> torch.nn.Module:
    layer = torch.nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("remove_weight", [True, False], ids=["packed", "kept"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 48])
def test_a_row_that_is_not_finite_stays_alone(tokens: int, remove_weight: bool) -> None:
    layer = layer_of(torch.bfloat16)
    weight = layer.weight.clone()
    base_products.fill_tiles(dispatch_cpu_unquantized_gemm, layer, remove_weight)
    assert remove_weight or torch.equal(layer.weight, weight)
    x = torch.randn(tokens, COLUMNS, dtype=torch.bfloat16)
    bias = torch.randn(ROWS, dtype=torch.bfloat16)
    expected = linear(x.float(), weight.float(), bias.float())
    for row in range(tokens):
        poisoned = x.clone()
        poisoned[row] = torch.nan
        y = layer.cpu_linear(poisoned, layer.weight, bias)
        others = [each for each in range(tokens) if each != row]
        assert y[row].isnan().all()
        torch.testing.assert_close(y[others].float(), expected[others], rtol=0.02, atol=0.05)


def test_rows_of_whole_tiles_are_left_to_vllm() -> None:
    layer = torch.nn.Linear(64, ROWS, bias=False, dtype=torch.bfloat16)
    seen = []
    base_products.fill_tiles(lambda *arguments: seen.append(arguments), layer, True)
    assert seen == [(layer, True)]
    assert not hasattr(layer, "cpu_linear")


@pytest.mark.parametrize(
    ("acts", "chosen", "expected"),
    [(True, "amx", "vec"), (True, "vec16", "vec16"), (False, "amx", "amx")],
)
def test_attention_is_computed_without_amx_where_the_plugin_acts(
    monkeypatch: pytest.MonkeyPatch, acts: bool, chosen: str, expected: str
) -> None:
    original: Callable[..., str] = lambda *_: chosen  # noqa: E731
    monkeypatch.setattr(kv_blocks, "empties_blocks", acts)
    assert base_products.attention_isa(original, *ATTENTION) == expected
