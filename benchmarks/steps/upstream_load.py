"""vLLM's own load generator against a server with this plugin, and one without.

`vllm bench serve --lora-modules ...` with random prompts, sixteen at a time, each for one of eight
adapters of ranks 8 to 64 on all projections of SmolLM2-135M in bfloat16. One server at a time, the
same seed; a short run before counts not. GuideLLM sends as many requests of the same lengths, if it
is installed, in an environment of its own; it names one model a run, so that all of these are for
the first adapter, which has rank 8.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.steps.cpu_throughput import MAX_RANK, RANKS, fastest_dtype, write_random_adapter

CLIENTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 16
ENGINES = {"plugin": (), "stock": ("--no-multilora",)}
MEASURES = {
    "output_throughput": "output tokens/s",
    "median_ttft_ms": "first token, median, ms",
    "p99_ttft_ms": "p99, ms",
    "median_tpot_ms": "later tokens, median, ms",
}


@benchmark(
    workload="`vllm bench serve`: random prompts of 64 + 16 tokens, 16 at a time, over eight "
    "adapters of ranks 8 to 64 on all projections of SmolLM2-135M in bfloat16",
    control="stock vLLM (`--no-multilora`), with the same seed",
    figure="what vLLM's own load generator reports",
    compares_to="stock vLLM",
    quick={"requests": 4, "rounds": 1, "engines": "plugin"},
)
def upstream_load(
    requests: int = 32,
    rounds: int = 3,
    stock_rounds: int = 1,
    engines: str = "plugin,stock",
    guidellm: str = "",
) -> Iterable[Figure]:
    """The load generator of vLLM itself against a server with this plugin, and one without.

    Args:
        requests: Of a run.
        rounds: Runs with the plugin.
        stock_rounds: Those without.
        engines: With commas.
        guidellm: The command of GuideLLM; empty: only vLLM's generator runs.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        modules = {
            f"adapter-{n}": write_random_adapter(scratch / f"{n}", model_config(), rank, seed=n)
            for n, rank in enumerate(RANKS)
        }
        for engine in engines.split(","):
            with vllm_server(
                base_model(),
                *("--served-model-name", "base", "--dtype", fastest_dtype(), "--enforce-eager"),
                *("--max-model-len", "256", "--max-num-seqs", str(CLIENTS)),
                *("--no-enable-prefix-caching", "--enable-lora", "--max-loras", str(len(RANKS))),
                *("--max-lora-rank", str(MAX_RANK), *ENGINES[engine]),
                *("--lora-modules", *(f"{each}={path}" for each, path in modules.items())),
                log=scratch / f"{engine}.log",
            ) as server:
                generate(server.url, list(modules), len(modules), scratch)  # each adapter once
                found: dict[str, list[dict[str, float]]] = {engine: []}
                for _ in range(stock_rounds if engine == "stock" else rounds):
                    of_all = generate(server.url, list(modules), requests, scratch)
                    found[engine].append(of_all)
                    if guidellm:
                        of_one = guide(guidellm, server.url, min(modules), requests, scratch)
                        found.setdefault(f"{engine}, GuideLLM, one adapter", []).append(of_one)
            for case, results in found.items():
                for key, measure in MEASURES.items():
                    yield Figure(case, measure, [one[key] for one in results])


def generate(url: str, adapters: list[str], requests: int, scratch: Path) -> dict[str, float]:
    """What the load generator reports.

    Raises:
        RuntimeError: Not all requests were answered.
    """
    result = scratch / "result.json"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
        *("--base-url", url, "--model", "base", "--tokenizer", str(base_model())),
        *("--dataset-name", "random", "--random-input-len", str(PROMPT_TOKENS)),
        *("--random-output-len", str(NEW_TOKENS), "--ignore-eos", "--seed", "0"),
        *("--num-prompts", str(requests), "--max-concurrency", str(CLIENTS)),
        *("--lora-assignment", "round-robin", "--save-result", "--result-filename", str(result)),
        *("--disable-tqdm", "--lora-modules", *adapters),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    found: dict[str, float] = json.loads(result.read_text())
    if found["completed"] != requests:
        raise RuntimeError(f"{found['completed']} of {requests} requests were answered")
    return found


def guide(guidellm: str, url: str, adapter: str, requests: int, scratch: Path) -> dict[str, float]:
    """What GuideLLM reports, by the names that vLLM's load generator has for it.

    Raises:
        RuntimeError: Not all requests were answered.
    """
    result = scratch / "guidellm.json"
    result.unlink(missing_ok=True)
    command = [
        *(guidellm, "run", "--backend", f"kind=openai_http,target={url},model={adapter}"),
        *("--profile", f"kind=concurrent,streams={CLIENTS}"),
        *("--constraint", f"kind=max_requests,count={requests}"),
        "--data",
        f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={NEW_TOKENS}",
        *("--tokenizer", f"kind=hf_auto,model={base_model()}"),
        *("--output", f"kind=json,path={result}", "--disable-console"),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (run,) = json.loads(result.read_text())["benchmarks"]
    metrics = run["metrics"]
    if (answered := metrics["request_totals"]["successful"]) != requests:
        raise RuntimeError(f"{answered} of {requests} requests were answered")
    first = metrics["time_to_first_token_ms"]["successful"]
    return {
        "output_throughput": metrics["output_tokens_per_second"]["successful"]["mean"],
        "median_ttft_ms": first["median"],
        "p99_ttft_ms": first["percentiles"]["p99"],
        "median_tpot_ms": metrics["inter_token_latency_ms"]["successful"]["median"],
    }
