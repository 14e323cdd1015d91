"""Layers that vLLM has in other parts than checkpoints."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.adapters.checkpoints import write
from vllm_multilora.integration.worker_link.fill_link import Filled

from ..allocated_slots import Setting, real_manager
from ..models import tiny_models
from .test_expert_adapters import SLOT, filler

pytestmark = pytest.mark.serving

QWEN3_5 = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
FIRST, LAST = ("in_proj_qkv", 256), ("in_proj_z", 128)


@pytest.mark.parametrize("parts", [(FIRST,), (LAST,), (FIRST, LAST)], ids=str)
def test_each_part_is_where_the_layer_has_it(tmp_path: Path, parts: tuple) -> None:
    from vllm_multilora.integration.offline.model_without_weights import one_worker

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_5))
    layer, rank, scaling = "model.layers.0.linear_attn", 4, 2.0
    tensors, expected = {}, torch.zeros(FIRST[1] + LAST[1], QWEN3_5["hidden_size"])
    for kind, rows in parts:
        a = torch.randn(rank, QWEN3_5["hidden_size"]).bfloat16()
        b = torch.randn(rows, rank).bfloat16()
        name = f"base_model.model.{layer}.{kind}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        start = 0 if kind == FIRST[0] else FIRST[1]
        expected[start : start + rows] = scaling * b.float() @ a.float()
    adapter = write(tmp_path / "adapter", tensors, rank, scaling * rank)
    with (
        real_manager(tmp_path, Setting(max_loras=2, max_lora_rank=8), one_worker) as manager,
        filler(manager) as fill,
    ):
        answer = fill(adapter)
        assert isinstance(answer, Filled), answer
        module = manager.modules[f"{layer}.in_proj_qkvz"]
        stacked = zip(module.lora_a_stacked, module.lora_b_stacked, strict=True)
        held = torch.cat([b[SLOT, 0].float() @ a[SLOT, 0].float() for a, b in stacked])
        torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("write_model", "kind", "outputs"),
    [
        (tiny_models.write_granite_hybrid, "mamba.in_proj", 2 * 256 + 2 * 16 + 8),
        (tiny_models.write_phi3_config, "self_attn.qkv_proj", 128 + 2 * 32),
    ],
    ids=["states of one group", "one key-value head"],
)
def test_a_rank_has_the_rows_that_vllm_loads_for_it(
    tmp_path: Path, write_model: Callable[[Path], Path], kind: str, outputs: int, rank: int
) -> None:
    """Both ranks need the rows of what there is only one of."""
    from vllm.distributed import parallel_state

    from vllm_multilora.integration.offline.model_without_weights import one_worker

    @contextmanager
    def second() -> Iterator[None]:
        with one_worker(of=2):
            group = parallel_state.get_tp_group()
            group.rank_in_group = rank
            try:
                yield
            finally:
                group.rank_in_group = 0

    folder = write_model(tmp_path / "model")
    module, inputs, r = f"model.layers.0.{kind}", 128, 4
    a, b = torch.randn(r, inputs).bfloat16(), torch.randn(outputs, r).bfloat16()
    name = f"base_model.model.{module}"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    adapter = write(tmp_path / "adapter", tensors, r, r)
    setting = Setting(max_loras=2, max_lora_rank=8, tensor_parallel_size=2)
    with real_manager(folder, setting, second) as manager, filler(manager) as fill:
        answer = fill(adapter)
        assert isinstance(answer, Filled), answer
        layer = manager.modules[module]
        assert layer.tp_rank == rank
        weight = layer.base_layer.weight
        weight.weight_loader(weight, (b.float() @ a.float()).to(weight.dtype))
        held = layer.lora_b_stacked[0][SLOT, 0].float() @ layer.lora_a_stacked[0][SLOT, 0].float()
        torch.testing.assert_close(held.to(weight.dtype), weight.data, rtol=1e-2, atol=1e-2)
