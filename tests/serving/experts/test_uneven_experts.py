"""Adapters of some experts only, at several ranks: what slots and host memory hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters.checkpoints import write
from vllm_multilora.adapters.validation import validate
from vllm_multilora.integration.worker_link.fill_link import Filled

from ..allocated_slots import real_manager, write_configs
from ..kinds.test_expert_adapters import SETTING, filler, in_slot

pytestmark = pytest.mark.serving

RANKS = {(0, "w1"): 4, (0, "w3"): 4, (2, "w2"): 8, (3, "w1"): 1, (3, "w2"): 2}
"""Ranks of the first layer's experts, by projection; there are none of the second layer."""

WIDTH, INNER, ALPHA = 96, 176, 8
SHAPES = {"w1": (WIDTH, INNER), "w2": (INNER, WIDTH), "w3": (WIDTH, INNER)}


def write_some(folder: Path) -> tuple[Path, dict[tuple[int, str], torch.Tensor]]:
    """Writes an adapter for a Mixtral, and what it adds to each expert's projection."""
    generator = torch.Generator().manual_seed(0)
    tensors, deltas, ranks = {}, {}, {}
    for (expert, kind), rank in RANKS.items():
        inputs, outputs = SHAPES[kind]
        a = torch.randn(rank, inputs, generator=generator).bfloat16().float()
        b = torch.randn(outputs, rank, generator=generator).bfloat16().float()
        module = f"block_sparse_moe.experts.{expert}.{kind}"
        name = f"base_model.model.model.layers.0.{module}.lora"
        tensors |= {f"{name}_A.weight": a, f"{name}_B.weight": b}
        deltas[expert, kind] = b @ a * (ALPHA / rank)
        ranks[module] = rank
    return write(folder, tensors, 4, ALPHA, rank_pattern=ranks), deltas


@pytest.mark.smoke("MoE formats")
def test_slots_hold_what_some_experts_add_and_zeros_of_the_others(tmp_path: Path) -> None:
    from vllm_multilora.integration.offline.model_without_weights import one_worker

    write_configs(tmp_path)
    adapter, deltas = write_some(tmp_path / "adapter")
    with (
        real_manager(tmp_path / "mixtral", SETTING, one_worker) as manager,
        filler(manager) as fill,
    ):
        assert validate(adapter, manager.layout) == []
        answer = fill(adapter)
        assert isinstance(answer, Filled), answer
        first, second = (m for name, m in manager.modules.items() if name.endswith("experts"))
        for part, kinds in (("w13", ("w1", "w3")), ("w2", ("w2",))):
            found = in_slot(first, part).chunk(len(kinds), dim=1)
            for kind, of_kind in zip(kinds, found, strict=True):
                for expert, adds in enumerate(of_kind):
                    expected = deltas.get((expert, kind), torch.zeros_like(adds))
                    torch.testing.assert_close(adds, expected, rtol=1e-2, atol=1e-2)
            assert not in_slot(second, part).any()
