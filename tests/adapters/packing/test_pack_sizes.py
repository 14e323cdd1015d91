"""Host memory at the sizes of Llama-3.1-8B: that of the true ranks, and nothing on top."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multilora_kernels.dtypes import BFLOAT16
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout

from ..checkpoints import PREFIX
from ..packs import take

# Two layers of the thirty-two: what a layer takes, all of them take.
LAYERS, MAX_RANK = 2, 64
# Kind, inputs, outputs, whether tensor parallelism splits its outputs (or else its inputs).
KINDS = (
    ("self_attn.q_proj", 4096, 4096, True),
    ("self_attn.k_proj", 4096, 1024, True),
    ("self_attn.v_proj", 4096, 1024, True),
    ("self_attn.o_proj", 4096, 4096, False),
    ("mlp.gate_proj", 4096, 14336, True),
    ("mlp.up_proj", 4096, 14336, True),
    ("mlp.down_proj", 14336, 4096, False),
)
RANKS = (8, 12, 16, 32, 64)
BYTES_OF_RANK_ONE = 2 * LAYERS * sum(inputs + outputs for _, inputs, outputs, _ in KINDS)


def layout(workers: int, worker: int) -> ModelLayout:
    """What one of the workers keeps."""
    slices = []
    for layer in range(LAYERS):
        for kind, inputs, outputs, splits_outputs in KINDS:
            kept = {"inputs": (0, inputs), "outputs": (0, outputs)}
            split = "outputs" if splits_outputs else "inputs"
            share = kept[split][1] // workers
            kept[split] = (worker * share, (worker + 1) * share)
            slices.append(
                SliceLayout(
                    f"model.layers.{layer}.{kind}",
                    len(slices),
                    inputs,
                    outputs,
                    kept["inputs"],
                    kept["outputs"],
                )
            )
    return ModelLayout(tuple(slices), MAX_RANK, BFLOAT16, columns_first=False)


def write(folder: Path, rank: int) -> Path:
    """An adapter of all projections."""
    folder.mkdir()
    tensors = {}
    for layer in range(LAYERS):
        for kind, inputs, outputs, _ in KINDS:
            name = f"{PREFIX}model.layers.{layer}.{kind}.lora_"
            tensors[f"{name}A.weight"] = torch.zeros(rank, inputs, dtype=torch.bfloat16)
            tensors[f"{name}B.weight"] = torch.zeros(outputs, rank, dtype=torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [kind.rpartition(".")[2] for kind, *_ in KINDS]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {rank: write(root / f"r{rank}", rank) for rank in RANKS}


def packed_bytes(folder: Path, model: ModelLayout) -> int:
    return take(folder, model).nbytes


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapter_takes_the_bytes_of_its_rank(adapters, rank):
    found = packed_bytes(adapters[rank], layout(1, 0))
    assert found == pytest.approx(rank * BYTES_OF_RANK_ONE, rel=0.01)
    # Its own file says the same; there is a header of a few kilobytes beside the tensors.
    file = adapters[rank] / "adapter_model.safetensors"
    assert found == pytest.approx(file.stat().st_size, rel=0.01)


def test_a_mixed_fleet_takes_the_sum_of_its_ranks(adapters):
    found = sum(packed_bytes(folder, layout(1, 0)) for folder in adapters.values())
    assert found == pytest.approx(sum(RANKS) * BYTES_OF_RANK_ONE, rel=0.01)


@pytest.mark.parametrize("rank", [8, 64])
def test_two_workers_keep_their_slices_only(adapters, rank):
    """Half of B where outputs are split and half of A where inputs are; the other part whole."""
    of_rank_one = (
        2
        * LAYERS
        * sum(
            inputs + outputs // 2 if splits_outputs else inputs // 2 + outputs
            for _, inputs, outputs, splits_outputs in KINDS
        )
    )
    for worker in range(2):
        found = packed_bytes(adapters[rank], layout(2, worker))
        assert found == pytest.approx(rank * of_rank_one, rel=0.01)


@pytest.mark.parametrize("rank", [8, 64])
def test_workers_that_share_the_ranks_hold_every_number_once(adapters, rank):
    """Fully sharded: A's rows are split by rank where its columns are not, and B's by outputs."""
    total = 0
    for worker in range(2):
        half = MAX_RANK // 2
        model = layout(2, worker)
        slices = []
        for part in model.slices:
            if part.input_range == (0, part.inputs):
                part = replace(part, rank_range=(worker * half, (worker + 1) * half))
            else:
                share = part.outputs // 2
                part = replace(part, output_range=(worker * share, (worker + 1) * share))
            slices.append(part)
        total += packed_bytes(adapters[rank], replace(model, slices=tuple(slices)))
    assert total == pytest.approx(rank * BYTES_OF_RANK_ONE, rel=0.01)
