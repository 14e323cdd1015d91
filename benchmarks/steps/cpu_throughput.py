"""Throughput of a mixed-adapter batch on a CPU: the plugin, stock vLLM, and the base model.

A start is of three engines with the same settings: LoRA off (`base`), LoRA with this plugin
(`plugin`), LoRA with vLLM's own kernels (`stock`). Each round times the same requests on each,
one engine after the other and every other round in reverse, so that a change of the machine's speed
hits all of them; the prefix cache is cleared before every timing. Reported are medians over the
rounds of all starts, and the medians of the ratios taken within a round. There are several starts
because those of the same code have had medians of the ratio as far apart as 1.08 and 1.15.

The load: SmolLM2-135M, 16 requests of 100 prompt tokens and 48 generated ones,
spread over 8 adapters of ranks 8, 16, 32 and 64 on all seven projections, `max_lora_rank` 64.
The adapters are random: their effect does not matter for the time they take.

Stock's time depends on the C library: its kernels allocate large blocks in every layer, which glibc
returns to the system and asks for again. With `keep_memory`, the engines' environments make it keep
them.

`least` is the base model's time with what no kernel of adapters can go below here, on as many
threads as vLLM's worker has: on two cores, one. A decoding step reads every adapter's weights once,
as fast as the C library searches as many bytes in huge pages for one that is not there; the prompts
take the arithmetic of their tokens, as fast as PyTorch multiplies matrices in float32 or in the
slots' type. Nothing else is counted: neither activations, nor Python, nor that the base model's
weights leave the caches meanwhile. The plugin can take less, where it multiplies by the base
model's weights in less time than vLLM (see `base_products`): so `plugin` beside `base` is what a
user sees, and not what adapters cost.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.smollm2 import base_model, model_config

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for functions sent to workers

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4000000000"}
REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 16, 100, 48
RANKS = (8, 8, 16, 16, 32, 32, 64, 64)
MAX_RANK = 64
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _shapes(model_config: dict) -> dict[str, tuple[int, int]]:
    """Columns and rows of a layer's projections, by name."""
    hidden, inner = model_config["hidden_size"], model_config["intermediate_size"]
    head = hidden // model_config["num_attention_heads"]
    kv = head * model_config["num_key_value_heads"]
    return dict(
        zip(
            PROJECTIONS,
            [
                *((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)),
                *((hidden, inner), (hidden, inner), (inner, hidden)),
            ],
            strict=True,
        )
    )


def sizes_of(
    model_config: dict, projections: Sequence[str] = PROJECTIONS
) -> dict[str, tuple[int, int]]:
    """Columns and rows of a model's projections, by name: `layers.0.mlp.up_proj`."""
    shapes = _shapes(model_config)
    return {
        f"layers.{layer}.{'mlp' if name in PROJECTIONS[4:] else 'self_attn'}.{name}": shapes[name]
        for layer in range(model_config["num_hidden_layers"])
        for name in projections
    }


def write_random_adapter(
    folder: Path,
    model_config: dict,
    rank: int,
    seed: int,
    projections: Sequence[str] = PROJECTIONS,
) -> Path:
    """Writes a PEFT checkpoint of a random adapter on projections of a Llama-like model."""
    sizes = sizes_of(model_config, projections)
    return write_random_lora(folder, sizes, rank, seed)


def write_random_lora(
    folder: Path, sizes: Mapping[str, tuple[int, int]], rank: int, seed: int
) -> Path:
    """Writes a PEFT checkpoint of a random adapter.

    Args:
        folder: Does not exist yet.
        sizes: Columns and rows of the layers that it adapts, by their names in the model.
        rank: Of all of them.
        seed: The same gives the same numbers.
    """
    import torch
    from safetensors.torch import save_file

    random_numbers = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (columns, rows) in sizes.items():
        for part, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            values = torch.randn(shape, generator=random_numbers) * 0.01
            key = f"base_model.model.model.{name}.{part}.weight"
            tensors[key] = values.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = list(dict.fromkeys(name.rpartition(".")[2] for name in sizes))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def seconds_of(
    engine: LLM,
    prompts: Sequence[Any],
    lora: Sequence[LoRARequest] | None,
    tokens: int,
    **sampling: Any,
) -> float:
    """How long an engine takes for so many tokens after each prompt, without a prefix cache."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **sampling)
    engine.reset_prefix_cache()
    begin = time.perf_counter()
    outputs = engine.generate(prompts, greedy, lora_request=lora, use_tqdm=False)
    elapsed = time.perf_counter() - begin
    assert sum(len(o.outputs[0].token_ids) for o in outputs) == len(prompts) * tokens
    return elapsed


def fastest_dtype() -> str:
    """bfloat16 where the processor multiplies it, else float32.

    Elsewhere PyTorch's bfloat16 products are many times slower than its float32 ones, which
    would hide any cost of LoRA behind the base model's.
    """
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "bfloat16" if "avx512_bf16" in flags or "bf16" in flags.split() else "float32"


def random_prompts(tokens: int) -> list[dict[str, list[int]]]:
    """The prompts of all requests, of that many tokens each; the same in every run."""
    numbers = random.Random(0)
    return [
        {"prompt_token_ids": [numbers.randrange(1000, 40000) for _ in range(tokens)]}
        for _ in range(REQUESTS)
    ]


def requested_adapters(folder: Path, model_config: dict) -> list[LoRARequest]:
    """Each request's adapter, one of `RANKS` after the other; written into the folder."""
    from vllm.lora.request import LoRARequest

    adapters = [
        LoRARequest(
            f"adapter-{i}",
            i + 1,
            str(write_random_adapter(folder / str(i), model_config, rank, seed=i)),
        )
        for i, rank in enumerate(RANKS)
    ]
    return [adapters[i % len(adapters)] for i in range(REQUESTS)]


def threads_of(worker: Any) -> int:
    """On how many threads a worker of vLLM computes; for `collective_rpc`."""
    import torch

    return torch.get_num_threads()


def reading_seconds(model_config: dict, ranks: int, dtype: str, threads: int) -> float:
    """Seconds in which the weights of adapters with so many ranks in all are read once, here."""
    import torch

    from multilora_kernels import host_memory

    size = ranks * _numbers_of_a_rank(model_config) * getattr(torch, dtype).itemsize
    (zeros,) = host_memory.zeros([(size,)], torch.uint8)
    search = ctypes.CDLL(None).memchr  # releases the GIL
    search.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    part = size // threads
    starts = range(zeros.data_ptr(), zeros.data_ptr() + part * threads, part)
    with ThreadPoolExecutor(threads) as pool:
        return _fastest(lambda: list(pool.map(lambda start: search(start, 1, part), starts)))


def least_seconds(model_config: dict, dtype: str, threads: int) -> float:
    """Seconds that all requests' adapters need for reading and arithmetic alone, measured here."""
    import torch

    dtypes = (torch.float32, getattr(torch, dtype))
    squares = [torch.ones(1024, 1024, dtype=each) for each in dtypes]
    with _computing_on(threads):
        multiply = min(_fastest(lambda each=each: torch.mm(each, each)) for each in squares)
    products = sum(RANKS) * _numbers_of_a_rank(model_config) * REQUESTS * PROMPT_TOKENS / len(RANKS)
    read = reading_seconds(model_config, sum(RANKS), dtype, threads)
    return (NEW_TOKENS - 1) * read + products * multiply / 1024**3


@contextmanager
def _computing_on(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _numbers_of_a_rank(model_config: dict) -> int:
    return sum(map(sum, sizes_of(model_config).values()))


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(10):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@benchmark(
    workload="SmolLM2-135M, 16 requests of 100 + 48 tokens, 8 adapters of ranks 8 to 64 on all "
    "projections",
    control="the base model with LoRA off, and stock vLLM, in the same rounds",
    figure="the plugin's time divided by the base model's",
    compares_to="the goal, 1.10, and stock vLLM's time",
    quick={"rounds": 1, "stock_rounds": 0, "starts": 1},
)
def cpu_throughput(
    rounds: int = 3,
    stock_rounds: int = 1,
    starts: int = 3,
    dtype: str = "auto",
    lora_dtype: str = "auto",
    keep_memory: bool = False,
    compiled: bool = False,
) -> Iterable[Figure]:
    """Throughput of a mixed-adapter batch on a CPU: the plugin, stock vLLM, and the base model.

    Args:
        rounds: Of the base model and the plugin, for each start.
        stock_rounds: Those of the first start that time stock vLLM too.
        starts: How often the engines are started.
        dtype: Of the model; `auto` is the one that this processor is fastest with.
        lora_dtype: Of the slots; `auto` is the model's. The adapters' files are in bfloat16.
        keep_memory: Whether glibc is told to keep large blocks of memory.
        compiled: Whether models are compiled; stock vLLM compiles none with LoRA on CPUs.
    """
    from vllm import LLM, SamplingParams

    model, config = base_model(), model_config()
    prompts = random_prompts(PROMPT_TOKENS)

    model_dtype = fastest_dtype() if dtype == "auto" else dtype
    slots_dtype = model_dtype if lora_dtype == "auto" else lora_dtype

    environment = KEEP_MEMORY if keep_memory else {}
    with tempfile.TemporaryDirectory() as scratch, patch.dict(os.environ, environment):
        requests = requested_adapters(Path(scratch), config)

        def start(lora: bool, **additional: dict) -> LLM:
            settings = {
                "model": str(model),
                "dtype": model_dtype,
                "enforce_eager": not compiled,
                "compilation_config": {"mode": 3} if compiled else {},
                "max_model_len": 256,
                "max_num_seqs": REQUESTS,
                "additional_config": additional,
            }
            if lora:
                settings |= {
                    "enable_lora": True,
                    "max_loras": len(RANKS),
                    "max_lora_rank": MAX_RANK,
                    "lora_dtype": lora_dtype,
                }
            return LLM(**settings)

        def seconds(engine: LLM, lora: Sequence[LoRARequest] | None) -> float:
            return seconds_of(engine, prompts, lora, NEW_TOKENS)

        found: list[dict[str, float]] = []
        for number in range(starts):
            in_stock = 0 if number else stock_rounds
            engines = {"base": start(lora=False), "plugin": start(lora=True)}
            if in_stock:
                engines["stock"] = start(lora=True, multilora={"backend": "vllm"})
            try:
                (threads,) = engines["base"].collective_rpc(threads_of)
                least = least_seconds(config, slots_dtype, threads)
                loras = {name: None if name == "base" else requests for name in engines}
                for name in ("base", "plugin"):
                    seconds(engines[name], loras[name])  # warms up
                if in_stock:  # loads its adapters; a round of it takes minutes
                    engines["stock"].generate(
                        random_prompts(1),
                        SamplingParams(max_tokens=1),
                        lora_request=requests,
                        use_tqdm=False,
                    )
                for of_start in range(max(rounds, in_stock)):
                    names = [n for n in engines if n != "stock" or of_start < in_stock]
                    order = names[:: -1 if of_start % 2 else 1]
                    times = {name: seconds(engines[name], loras[name]) for name in order}
                    found.append(times | {"least": least})
                    reported = ", ".join(f"{name} {time:.2f} s" for name, time in times.items())
                    print(f"start {number + 1}, round {of_start + 1}: {reported}", flush=True)
            finally:
                for engine in engines.values():
                    engine.llm_engine.engine_core.shutdown(timeout=30.0)
    tokens = REQUESTS * NEW_TOKENS
    for name in ("base", "plugin", "stock"):
        if taken := [r[name] for r in found if name in r]:
            yield Figure("", f"{name}, s", taken)
            yield Figure("", f"{name}, output tokens/s", [tokens / each for each in taken])
    yield Figure("", "plugin time / base time", [r["plugin"] / r["base"] for r in found])
    yield Figure("", "least time / base time", [1 + r["least"] / r["base"] for r in found])
    if stock_rounds:
        ratios = [r["stock"] / r["plugin"] for r in found if "stock" in r]
        yield Figure("", "stock time / plugin time", ratios)
