"""vLLM's kernels as contenders: they compute what they should, and vLLM stays as it is."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from tools.kernels.measure.agreement import TOLERANCES, Expected
from tools.kernels.measure.batches import BatchSpec, Layer, LayerBatch, build
from tools.kernels.measure.contenders import load_contenders

pytestmark = [
    pytest.mark.slow,  # imports vLLM
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QKV, PLAIN = Layer("qkv", 96, (160, 32, 32)), Layer("plain", 96, (80,))
SPEC = BatchSpec(QKV, tokens=150, ranks=16, max_loras=3, max_rank=32)


@pytest.fixture(scope="module")
def contenders():
    entered = load_contenders()
    assert entered.left_out == ()
    return {contender.name: contender for contender in entered.contenders}


def with_tokens_without_adapter(spec: BatchSpec) -> LayerBatch:
    batch = build(spec, DEVICE, torch.float16)
    batch.token_slots[::4] = -1
    batch.plan.update(batch.token_slots)
    return batch


@pytest.mark.parametrize("name", ["vllm", "vllm (specialized)"])
@pytest.mark.parametrize("layer", [QKV, PLAIN], ids=lambda layer: layer.name)
def test_they_compute_the_batch(contenders, name, layer):
    batch = with_tokens_without_adapter(replace(SPEC, layer=layer))
    error = Expected(batch).relative_error(contenders[name].prepare(batch))
    assert error <= TOLERANCES[torch.float16]


def test_weights_of_another_shape_at_the_same_addresses_are_noticed(contenders):
    """What vLLM remembers by address would describe weights that are no longer there."""
    one = build(SPEC, DEVICE, torch.float16)
    contenders["vllm"].prepare(one)()
    other = build(replace(SPEC, max_rank=16), DEVICE, torch.float16)
    for kept, new in ((one.lora_a, other.lora_a), (one.lora_b, other.lora_b)):
        for i, weights in enumerate(new):
            kept[i].view(-1)[: weights.numel()] = weights.view(-1)
    other.lora_a, other.lora_b = (
        tuple(k.view(-1)[: n.numel()].view(n.shape) for k, n in zip(kept, new, strict=True))
        for kept, new in ((one.lora_a, other.lora_a), (one.lora_b, other.lora_b))
    )
    error = Expected(other).relative_error(contenders["vllm"].prepare(other))
    assert error <= TOLERANCES[torch.float16]


def test_vllms_own_modules_are_left_alone(contenders):
    contenders["vllm"].prepare(build(SPEC, DEVICE, torch.float16))
    utils = sys.modules["vllm.triton_utils"]
    assert utils.__spec__ is not None
    kernels = sys.modules["vllm.lora.ops.triton_ops.kernel_utils"]
    assert kernels.triton is utils.triton
    if not utils.HAS_TRITON:
        assert not isinstance(kernels.mm_k, InterpretedFunction)
