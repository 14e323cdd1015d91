"""Who multiplies by a base layer's weights on a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import linear

from multilora_kernels.native.packed_linear import PackedLinear, pack
from vllm_multilora.integration.worker.base_layers import base_products
from vllm_multilora.integration.worker.base_layers.base_products import dispatch_gemm

needs_packing = pytest.mark.skipif(
    pack(torch.zeros(64, 64)) is None, reason="the C code multiplies on AVX-512 alone"
)


class VLLM:
    """Does as vLLM does, and says so."""

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def __call__(self, layer: torch.nn.Module, remove_weight: bool) -> None:
        self.asked.append(remove_weight)
        layer.cpu_linear = linear


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> VLLM:
    """On a processor without AMX, for an engine with adapters that the C kernels compute."""
    monkeypatch.setattr(base_products, "get_current_vllm_config_or_none", object)
    monkeypatch.setattr(base_products, "is_active", lambda _: True)
    monkeypatch.setattr(base_products, "kernel_backend", lambda _: "native")
    monkeypatch.setattr(base_products, "settings_of", lambda _: SimpleNamespace(dora=False))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return VLLM()


def layer_of(rows: int = 128, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    layer = torch.nn.Linear(64, rows, bias=False, dtype=dtype)
    layer.weight.requires_grad_(False)
    return layer


@needs_packing
@pytest.mark.parametrize("remove_weight", [True, False], ids=["packed", "kept"])
def test_the_c_kernels_multiply_and_the_weights_are_there_once(
    vllm: VLLM, remove_weight: bool
) -> None:
    layer, x = layer_of(), torch.randn(3, 64)
    weight = layer.weight.clone()
    dispatch_gemm(vllm, layer, remove_weight)
    assert vllm.asked == []
    assert isinstance(layer.cpu_linear, PackedLinear)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), linear(x, weight))
    assert torch.equal(layer.weight, weight.new_empty(0) if remove_weight else weight)


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (base_products, "get_current_vllm_config_or_none", lambda: None),
        (base_products, "is_active", lambda _: False),
        (base_products, "kernel_backend", lambda _: "torch"),
        (base_products, "kernel_backend", lambda _: "vllm"),
        (base_products, "current_platform", SimpleNamespace(is_zen_cpu=lambda: True)),
        (torch.cpu, "_is_amx_tile_supported", lambda: True),
    ],
    ids=["no-engine", "plugin-off", "torch", "vllm", "zentorch", "amx"],
)
def test_otherwise_vllm_does(
    vllm: VLLM, monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object
) -> None:
    monkeypatch.setattr(module, name, value)
    layer = layer_of()
    dispatch_gemm(vllm, layer, True)
    assert vllm.asked == [True]
    assert layer.cpu_linear is linear


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(100, 64), torch.zeros(64, 64, device="meta"), torch.zeros(2, 64, 64)],
    ids=["no-whole-blocks", "meta", "experts"],
)
def test_weights_of_other_kinds_are_left_to_vllm(vllm: VLLM, weight: torch.Tensor) -> None:
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_gemm(vllm, layer, False)
    assert vllm.asked == [False]
    assert layer.weight.shape == weight.shape
