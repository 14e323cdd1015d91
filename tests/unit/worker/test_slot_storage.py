"""How the slots of linear layers lie in memory, on whatever device."""

from types import SimpleNamespace

import pytest
import torch

from vllm_multilora.integration.worker.slots.model_manager import _store_by_column


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_columns_of_b_are_contiguous_on_every_device(device):
    slots, rank, inputs, outputs = 2, 8, 32, 48
    module = SimpleNamespace(
        lora_a_stacked=(torch.ones(slots, 1, rank, inputs),),
        lora_b_stacked=(torch.ones(slots, 1, outputs, rank),),
    )
    _store_by_column([module], torch.bfloat16, torch.device(device))
    (a,), (b,) = module.lora_a_stacked, module.lora_b_stacked
    assert (a.shape, b.shape) == ((slots, 1, rank, inputs), (slots, 1, outputs, rank))
    assert b.stride()[-2:] == (1, outputs)
    assert {(t.device.type, t.dtype) for t in (a, b)} == {(device, torch.bfloat16)}
    if device == "cpu":
        assert not a.any()
        assert not b.any()
