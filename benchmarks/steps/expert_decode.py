"""Decoding with adapters of experts on a CPU, against the base model, with few slots and many.

A random Qwen3-MoE: 4 layers of width 512, in each 16 experts of width 512, of which a token has 4.
16 requests of 4 prompt tokens and 32 generated ones over 8 adapters of ranks 8, 16, 32 and 64 on
all projections of all experts. Three engines: without LoRA, with 8 slots and with 64, all of rank
64. Each round times all three, one after the other and every other round in reverse. Reported are
ratios within a round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from benchmarks.steps.cpu_throughput import (
    MAX_RANK,
    RANKS,
    REQUESTS,
    fastest_dtype,
    seconds_of,
    write_random_lora,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

PROMPT_TOKENS, NEW_TOKENS = 4, 32
LAYERS, EXPERTS, WIDTH, INNER, VOCABULARY = 4, 16, 512, 512, 4096


def write_model(folder: Path) -> Path:
    """Writes the random base model."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        moe_intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        max_position_embeddings=256,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_expert_adapter(folder: Path, rank: int, seed: int) -> Path:
    """Writes a random adapter of all projections of all experts, one by one."""
    shapes = {"gate_proj": (WIDTH, INNER), "up_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
    sizes = {
        f"layers.{layer}.mlp.experts.{expert}.{name}": shape
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    }
    return write_random_lora(folder, sizes, rank, seed)


@benchmark(
    workload="a random Qwen3-MoE, 16 requests of 4 + 32 tokens, 8 adapters of experts",
    control="the base model without LoRA, in the same rounds",
    figure="the time with adapters over the base model's, and with 64 slots over that with 8",
    compares_to="1.5 and 1.03, the goals",
    quick={"rounds": 1},
)
def expert_decode(rounds: int = 7, dtype: str = "auto") -> Iterable[Figure]:
    """Decoding with adapters of experts on a CPU, against the base model."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    prompts = [
        {
            "prompt_token_ids": [
                (7 * row + 131 * token) % VOCABULARY for token in range(PROMPT_TOKENS)
            ]
        }
        for row in range(REQUESTS)
    ]

    def start(model: Path, slots: int) -> LLM:
        lora = {"enable_lora": True, "max_loras": slots, "max_lora_rank": MAX_RANK}
        return LLM(
            str(model),
            dtype=fastest_dtype() if dtype == "auto" else dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=REQUESTS,
            **(lora if slots else {}),
        )

    def seconds(engine: LLM, requests: list[LoRARequest] | None) -> float:
        return seconds_of(engine, prompts, requests, NEW_TOKENS, detokenize=False)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = write_model(folder / "base")
        adapters = [
            LoRARequest(f"{i}", i + 1, str(write_expert_adapter(folder / f"{i}", rank, i)))
            for i, rank in enumerate(RANKS)
        ]
        requests = [adapters[i % len(adapters)] for i in range(REQUESTS)]
        runs = {
            "base": (start(model, 0), None),
            "8 slots": (start(model, 8), requests),
            "64 slots": (start(model, 64), requests),
        }
        times = paired({name: partial(seconds, *run) for name, run in runs.items()}, rounds)
    yield Figure("", "8 slots / base", [r["8 slots"] / r["base"] for r in times])
    yield Figure("", "64 slots / 8 slots", [r["64 slots"] / r["8 slots"] for r in times])
