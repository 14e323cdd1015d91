"""Factors of DoRA adapters are found in memory that was set apart when the server started."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.serving  # imports vLLM

SLOTS, RANK = 3, 8
LAYERS = ((48, (40, 24)), (32, (56,)), (70, (33,)))
"""Inputs, and outputs of each slice."""


class Allocations(TorchDispatchMode):
    """Notes every operator that returns other memory than it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage()._cdata for t in given}
        if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in known:
            self.made.append((str(func), result.nbytes))
        return result


def make_layers(dtype: torch.dtype, lora_dtype: torch.dtype) -> list[Any]:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int, to: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(to)

    layers = []
    for inputs, outputs in LAYERS:
        base = SimpleNamespace(
            weight=random(sum(outputs), inputs, to=dtype), params_dtype=dtype, bias=None
        )
        layers.append(
            SimpleNamespace(
                base_layer=base,
                tp_size=1,
                tp_rank=0,
                n_slices=len(outputs),
                lora_a_stacked=tuple(
                    random(SLOTS, 1, RANK, inputs, to=lora_dtype) for _ in outputs
                ),
                lora_b_stacked=tuple(random(SLOTS, 1, RANK, n, to=lora_dtype).mT for n in outputs),
            )
        )
    return layers


def expected_factors(layers: list[Any], slot: int, ranks: list[int], magnitudes: Any) -> Any:
    lengths = []
    row = 0
    for layer in layers:
        first = 0
        for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            n, r = b.size(-2), ranks[row]
            whole = layer.base_layer.weight[first : first + n].double()
            whole = whole + b[slot, 0, :, :r].double() @ a[slot, 0, :r].double()
            lengths.append(whole.norm(dim=1))
            first, row = first + n, row + 1
    return magnitudes.double() / torch.cat(lengths) - 1


@pytest.mark.parametrize(
    ("dtype", "lora_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.bfloat16, 5e-2),
        (torch.bfloat16, torch.float16, 5e-2),
    ],
    ids=["float32", "bfloat16", "mixed"],
)
@pytest.mark.parametrize("elements", [1 << 20, 1 << 8], ids=["whole", "in-blocks"])
def test_an_adapters_first_use_allocates_nothing_on_the_device(
    monkeypatch, dtype, lora_dtype, tolerance, elements
):
    """What is allocated is what the factors are remembered in, in host memory."""
    from vllm_multilora.integration.worker.model import row_squares
    from vllm_multilora.integration.worker.model.output_factors import SlotFactors

    monkeypatch.setattr(row_squares, "_ELEMENTS", elements)
    layers = make_layers(dtype, lora_dtype)
    factors = SlotFactors(layers, SLOTS, "cpu")
    before = factors.nbytes
    outputs = sum(n for _, widths in LAYERS for n in widths)
    magnitudes = torch.rand(outputs, generator=torch.Generator().manual_seed(3)) + 1
    starts = np.cumsum([0, *(n for _, widths in LAYERS for n in widths)])[:-1]
    ranks = [8, 3, 1, 8]
    for slot in (1, 2):  # what is found of the base weights with the first serves the second
        rows, of_rows = np.arange(4, dtype=np.int32), np.array(ranks, np.int32)
        addresses = magnitudes.data_ptr() + 4 * starts
        digest = f"adapter {slot}"
        factors.fill(slot, rows, of_rows, addresses, factors.begin(slot, digest))
        with Allocations() as seen:
            factors.finish([slot])
        assert [nbytes for _, nbytes in seen.made] == [4 * outputs], seen.made
        assert factors._known[digest].equal(factors._values[slot])
        found = factors._values[slot]
        expected = expected_factors(layers, slot, ranks, magnitudes)
        assert (found - expected).abs().max() < tolerance
    assert factors.nbytes == before


def test_factors_are_made_of_nothing_that_a_sleep_loses():
    """A row without length, which has no factor, included."""
    from vllm_multilora.integration.worker.model.output_factors import SlotFactors

    layers = make_layers(torch.float32, torch.float32)
    layers[0].base_layer.weight[0] = 0
    layers[0].lora_b_stacked[0][1, 0, 0] = 0
    factors, found = SlotFactors(layers, SLOTS, "cpu"), []
    outputs = [n for _, widths in LAYERS for n in widths]
    magnitudes = torch.ones(sum(outputs))
    addresses = magnitudes.data_ptr() + 4 * np.cumsum([0, *outputs])[:-1]
    rows, ranks = np.arange(len(outputs), dtype=np.int32), np.full(len(outputs), 8, np.int32)
    for _ in range(2):
        factors.fill(1, rows, ranks, addresses, factors.begin(1, "digest"))
        factors.finish([1])
        found.append(factors._values[1].clone())
        for tensor in vars(factors._squares).values():
            if isinstance(tensor, torch.Tensor):
                tensor.fill_(math.nan if tensor.is_floating_point() else 255)
        factors.memory_lost()
    assert found[0][0].isinf()
    assert found[1].equal(found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_are_measured_in_float32_while_a_model_of_another_type_loads(dtype, monkeypatch):
    """vLLM makes the model's type PyTorch's default until all weights have been repacked."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_multilora.integration.worker.base_layers import base_products
    from vllm_multilora.integration.worker.model.row_squares import ROW_SQUARES

    monkeypatch.setattr(base_products, "is_active", lambda config: True)
    monkeypatch.setattr(base_products, "kernel_backend", lambda config: "torch")
    monkeypatch.setattr(base_products, "settings_of", lambda config: SimpleNamespace(dora=True))
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(4)).mul_(3e-4).to(dtype)
    expected, layer = weight.double().square().sum(1), SimpleNamespace(weight=weight)

    def repack(layer, remove_weight):
        layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
        layer.cpu_linear = None

    with set_current_vllm_config(VllmConfig()), set_default_torch_dtype(dtype):
        base_products.dispatch_gemm(repack, layer, remove_weight=True)
        assert not layer.weight.numel()
    found = ROW_SQUARES.get(layer)
    assert ((found - expected).abs() <= 1e-6 * expected).all()


def test_an_adapter_of_other_stages_alone_has_no_factors():
    """The whole adapter is one with magnitudes, and none of them are for this stage's layers."""
    from vllm_multilora.integration.worker.model.output_factors import SlotFactors

    factors = SlotFactors(make_layers(torch.float32, torch.float32), SLOTS, "cpu")
    none = np.zeros(0, np.int32)
    for _ in range(2):  # when it comes back, too
        known = factors.begin(1, "digest")
        factors.fill(1, none, none, np.zeros(0, np.int64), known)
        factors.finish([1])
    assert known is None
    assert not factors._marks.any()
    factors.weights_changed()
    factors.finish([1])


def test_sharded_layers_take_no_factors():
    """Their halves are calls of their own, on one rank too, and nothing multiplies their sum."""
    from vllm.lora import layers
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from vllm_multilora.integration.worker.model.output_factors import no_factors

    for name, refused in (
        ("ColumnParallelLinearWithShardedLoRA", True),
        ("ColumnParallelLinearWithLoRA", False),
    ):
        layer = object.__new__(getattr(layers, name))
        torch.nn.Module.__init__(layer)
        method = object.__new__(UnquantizedLinearMethod)
        layer.base_layer = SimpleNamespace(quant_method=method, weight=torch.zeros(2, 2))
        assert bool(no_factors(layer)) == refused, name
