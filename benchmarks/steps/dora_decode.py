"""Decoding with DoRA adapters against plain ones of the same ranks, on a CPU.

SmolLM2-135M, 16 requests of 4 prompt tokens and 64 generated ones over 8 adapters of ranks 8, 16,
32 and 64 on all seven projections; DoRA adapters have the plain ones' A and B, and magnitudes
beside them. Two engines: with `--multilora-dora` (`dora` and `plain`) and without (`without`,
plain adapters). Each round times all three, one after the other and every other round in reverse,
with all adapters in slots. Printed are medians and the medians of ratios within a round; and what
the lengths of the base weights' rows cost when a DoRA adapter is used for the first time.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.steps.cpu_throughput import (
    MAX_RANK,
    NEW_TOKENS,
    RANKS,
    REQUESTS,
    fastest_dtype,
    random_prompts,
    requested_adapters,
    seconds_of,
)

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

PROMPT_TOKENS = 4


def make_dora(folder: Path, target: Path, model: Path, seed: int) -> None:
    """Copies an adapter and adds magnitudes: the base rows' lengths, changed by 5 % or less."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    numbers = torch.Generator().manual_seed(seed)
    [weights] = model.glob("*.safetensors")
    with safe_open(weights, "pt") as base:
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            length = base.get_tensor(f"{module}.weight").float().norm(dim=1)
            change = 0.95 + 0.1 * torch.rand(length.shape, generator=numbers)
            tensors[name.replace("lora_A.weight", "lora_magnitude_vector")] = length * change
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))


def time_lengths(worker: Any) -> None:
    """Has the worker note how long it looks for the lengths of each adapter."""
    factors = worker.model_runner.lora_manager.model_manager.factors
    find, worker.multilora_lengths = factors._finish, []

    def timed(slot: int) -> None:
        begin = time.perf_counter()
        find(slot)
        rank = max(factors._adapters[slot].ranks.values())
        worker.multilora_lengths.append((rank, time.perf_counter() - begin))

    factors._finish = timed


def lengths(worker: Any) -> list[tuple[int, float]]:
    """Rank and seconds of each adapter whose lengths were found."""
    return worker.multilora_lengths


@benchmark(
    workload="SmolLM2-135M, 16 requests of 4 + 64 tokens, 8 DoRA adapters of ranks 8 to 64",
    control="plain adapters with the same A and B, in the same rounds",
    figure="the time of DoRA adapters over that of plain ones",
    compares_to="1.05, the goal",
    quick={"rounds": 1},
)
def dora_decode(rounds: int = 7, dtype: str = "auto") -> Iterable[Figure]:
    """Decoding with DoRA adapters against plain ones of the same ranks, on a CPU."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    model, config = base_model(), model_config()
    prompts = random_prompts(PROMPT_TOKENS)

    def start(**additional: bool) -> LLM:
        return LLM(
            str(model),
            dtype=fastest_dtype() if dtype == "auto" else dtype,
            enforce_eager=True,
            max_model_len=128,
            max_num_seqs=REQUESTS,
            enable_lora=True,
            max_loras=2 * len(RANKS),
            max_lora_rank=MAX_RANK,
            additional_config={"multilora": additional},
        )

    def seconds(engine: LLM, requests: list[LoRARequest], tokens: int = NEW_TOKENS) -> float:
        return seconds_of(engine, prompts, requests, tokens)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        plain = requested_adapters(folder, config)
        for i in range(len(RANKS)):
            make_dora(folder / f"{i}", folder / f"dora-{i}", model, seed=i)
        dora = [
            LoRARequest(
                f"dora-{r.lora_name}",
                r.lora_int_id + 100,
                f"{folder}/dora-{Path(r.lora_path).name}",
            )
            for r in plain
        ]
        with_dora, without = start(dora=True), start()
        with_dora.collective_rpc(time_lengths)
        runs = {"dora": (with_dora, dora), "plain": (with_dora, plain), "without": (without, plain)}
        times = paired({name: partial(seconds, *run) for name, run in runs.items()}, rounds)
        found = with_dora.collective_rpc(lengths)[0]
    for label, above, below in (
        ("DoRA / plain", "dora", "plain"),
        ("plain with --multilora-dora / without", "plain", "without"),
    ):
        yield Figure("", label, [r[above] / r[below] for r in times])
    for rank in sorted(set(RANKS)):
        yield Figure(
            "", f"lengths, rank {rank}, ms", [1000 * took for of, took in found if of == rank]
        )
