"""What a tenant notices of another with eight times its clients and long prompts beside it.

    python benchmarks/fairness.py [--rounds 5] [--seconds 20] [--slowdown 1.5] [--json FILE]
    python benchmarks/fairness.py --only cost [--rounds 15]

Three `vllm serve` side by side, with a random Llama of 8 layers, 768 wide, in bfloat16 and one
adapter a tenant: fair shares, the plugin without them, and stock vLLM. In each round every server
has every load in turn, so that ratios are between phases that lie close together:

- *solo*: the victim's clients, streaming;
- *beside*: the same, and the aggressor's, with eight times the clients and prompts sixteen times
  as long;
- *equal*: eight other tenants, each with the same clients, more than there are places in the batch.

The victim's 95th percentiles of the time to first token and from token to token are relative to
its solo run in the same server and round; what begins in the first two seconds does not count, as
nobody has had more than another then. Jain's index is of the tokens served to the eight, a
prompt's tokens counted once and generated ones twice.

What fair shares cost is measured without servers (`--only cost`: that alone): two engines of a tiny
Llama, with them and without, are given the same requests turn by turn, of one tenant and of eight.
Through HTTP the client and the waiting of vLLM's own processes for each other decide on a small
model's speed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx
from streams import token_times
from turns import paired

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

sys.path.insert(0, str(Path(__file__).parents[1]))

TENANTS = tuple(f"tenant-{number}" for number in range(8))
VICTIM, AGGRESSOR = "victim", "aggressor"
RANK, PLACES, STEP_TOKENS = 16, 64, 2048
SHORT, LONG = 16, 256
NEW_TOKENS = 48
SETTLE_S = 2.0
SERVERS = ("fair", "unfair", "stock")


@dataclass
class Served:
    """What a tenant's clients had in a phase.

    Attributes:
        first_ms: Time to first token of each stream.
        gaps_ms: From token to token of all streams.
        prompt: Tokens of prompts of the requests that were answered within the phase.
        generated: Tokens that they got; of streams, those that came within it.
    """

    first_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)
    prompt: int = 0
    generated: int = 0

    @property
    def cost(self) -> int:
        return self.prompt + 2 * self.generated


@dataclass(frozen=True)
class Load:
    """A tenant's clients in a phase."""

    tenant: str
    clients: int
    prompt: int
    streams: bool = False


async def ask_until(
    begin: float,
    end: float,
    client: httpx.AsyncClient,
    load: Load,
    numbers: random.Random,
    served: Served,
) -> None:
    """One client: one request after another; what does not end in time is cut off."""
    from tests.serving.tiny_models import VOCAB_SIZE

    await asyncio.sleep(numbers.random() * 0.2)
    while time.perf_counter() < end:
        body = {
            "model": load.tenant,
            "prompt": [numbers.randrange(VOCAB_SIZE) for _ in range(load.prompt)],
            "max_tokens": numbers.randint(NEW_TOKENS // 2, NEW_TOKENS),
            "temperature": 0,
            "ignore_eos": True,
            "stream": load.streams,
        }
        if load.streams:
            await _stream(begin, end, client, body, served)
        else:
            response = await client.post("/v1/completions", json=body)
            if response.is_error:
                raise RuntimeError(f"{load.tenant}: {response.status_code} {response.text}")
            served.generated += response.json()["usage"]["completion_tokens"]
        served.prompt += load.prompt


async def _stream(
    begin: float, end: float, client: httpx.AsyncClient, body: dict, served: Served
) -> None:
    asked = time.perf_counter()
    times = [arrived async for arrived in token_times(client, body)]
    if asked > begin and times[-1] < end:
        served.first_ms.append(1000 * (times[0] - asked))
        served.gaps_ms += (1000 * (after - before) for before, after in pairwise(times))
    served.generated += sum(moment < end for moment in times)


async def phase(url: str, loads: Sequence[Load], seconds: float, seed: int) -> dict[str, Served]:
    """Runs all clients for so long after a start; what each tenant was served, start included."""
    served = {load.tenant: Served() for load in loads}
    limits = httpx.Limits(max_connections=sum(load.clients for load in loads))
    async with httpx.AsyncClient(
        base_url=url, timeout=None, trust_env=False, limits=limits
    ) as client:
        begin = time.perf_counter() + SETTLE_S
        end = begin + seconds
        clients = []
        for load in loads:
            for number in range(load.clients):
                numbers = random.Random(f"{seed} {load} {number}")
                asking = ask_until(begin, end, client, load, numbers, served[load.tenant])
                clients.append(asyncio.create_task(asking))
        done, late = await asyncio.wait(clients, timeout=SETTLE_S + seconds)
        for task in late:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*late)
        for task in done:
            task.result()
    return served


def quantile(values: Sequence[float], share: float = 0.95) -> float:
    """Infinity where nothing was answered in time."""
    if not values:
        return float("inf")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def jain(values: Sequence[float]) -> float:
    """1 where all are equal, 1/n where one has everything."""
    squares = sum(value**2 for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else float("nan")


def run(options: argparse.Namespace, urls: dict[str, str]) -> dict[str, dict[str, list[float]]]:
    """All rounds on all servers; each figure of each round, by server."""
    victim = Load(VICTIM, options.clients, SHORT, streams=True)
    aggressor = Load(AGGRESSOR, 8 * options.clients, LONG)
    crowd = 2 * PLACES // len(TENANTS)
    loads = {
        "solo": [victim],
        "beside": [victim, aggressor],
        "equal": [Load(tenant, crowd, LONG // 4) for tenant in TENANTS],
    }
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in urls}
    for number in range(-1, options.rounds):  # the first round warms up, and does not count
        order = list(urls)
        random.Random(number).shuffle(order)
        for kind, clients in loads.items():
            for name in order:
                seconds = options.seconds if number >= 0 else 2.0
                try:
                    served = asyncio.run(phase(urls[name], clients, seconds, number))
                except Exception as error:
                    raise RuntimeError(f"round {number + 1}, {name}, load {kind!r}") from error
                if number >= 0:
                    note(figures[name], kind, served, SETTLE_S + seconds)
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    return figures


def note(
    figures: dict[str, list[float]], kind: str, served: dict[str, Served], seconds: float
) -> None:
    """Adds the figures of a phase."""

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    if VICTIM in served:
        add(f"{kind} first token", quantile(served[VICTIM].first_ms))
        add(f"{kind} next token", quantile(served[VICTIM].gaps_ms))
    add(f"{kind} cost a second", sum(each.cost for each in served.values()) / seconds)
    if kind == "equal":
        add("jain", jain([each.cost for each in served.values()]))


def report(figures: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Prints the tables; returns the medians over the rounds."""
    results: dict[str, dict[str, float]] = {}
    print("\n95th percentiles of the victim's times")
    print("| server | first token, solo | beside | ratio | next token, solo | beside | ratio |")
    print("|---" * 7 + "|")
    for name, values in figures.items():
        row, cells = results.setdefault(name, {}), []
        for what in ("first token", "next token"):
            solo, beside = values[f"solo {what}"], values[f"beside {what}"]
            ratio = statistics.median(b / s for s, b in zip(solo, beside, strict=True))
            row |= {f"solo {what}": statistics.median(solo), f"{what} ratio": ratio}
            cells += [f"{statistics.median(solo):.1f} ms", f"{statistics.median(beside):.1f} ms"]
            cells.append(f"{ratio:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")
    print("\ncost of all that was served in a second: beside, equal")
    for name, values in figures.items():
        both = [statistics.median(values[f"{kind} cost a second"]) for kind in ("beside", "equal")]
        results[name] |= {"beside cost a second": both[0], "equal cost a second": both[1]}
        print(f"{name}: {both[0]:.0f}, {both[1]:.0f}")
    print("\nJain's index of eight equal tenants (median, least of all rounds)")
    for name, values in figures.items():
        results[name]["jain"] = statistics.median(values["jain"])
        print(f"{name}: {results[name]['jain']:.4f}, {min(values['jain']):.4f}")
    return results


def write_base(path: Path) -> Path:
    """A model whose steps outweigh what HTTP and Python add to them, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.serving.tiny_models import VOCAB_SIZE, write_llama

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    write_llama(path)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def write_adapters(base: Path, folder: Path) -> dict[str, Path]:
    """One for each tenant, by name."""
    from tests.serving.recipes import AdapterRecipe
    from tests.serving.tiny_adapters import write_adapter

    return {
        name: write_adapter(base, folder / name, AdapterRecipe(name, rank=RANK), seed=n)
        for n, name in enumerate((*TENANTS, VICTIM, AGGRESSOR))
    }


def cost(base: Path, adapters: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Time with fair shares over time without, by load and round."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from tests.serving.tiny_models import VOCAB_SIZE

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "enable_lora": True,
        "enable_prefix_caching": False,
        "max_loras": len(adapters),
        "max_lora_rank": RANK,
        "max_model_len": 512,
        "max_num_batched_tokens": STEP_TOKENS,
        "max_num_seqs": PLACES,
        "skip_tokenizer_init": True,
    }
    engines = {
        is_fair: LLM(
            str(base), additional_config={"multilora": {"fair_shares": is_fair}}, **settings
        )
        for is_fair in (False, True)
    }
    numbers = random.Random(0)
    prompts = [
        {"prompt_token_ids": [numbers.randrange(VOCAB_SIZE) for _ in range(LONG // 4)]}
        for _ in range(2 * PLACES)
    ]
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    named = [LoRARequest(name, n, str(path)) for n, (name, path) in enumerate(adapters.items(), 1)]
    equal = [named[n % len(TENANTS)] for n in range(len(prompts))]
    loads = {"alone": named[:1] * len(prompts), "equal": equal}

    def seconds(is_fair: bool, kind: str) -> float:
        begin = time.perf_counter()
        engines[is_fair].generate(prompts, sampling, lora_request=loads[kind], use_tqdm=False)
        return time.perf_counter() - begin

    ratios = {}
    for kind in loads:
        acts = {"fair": partial(seconds, True, kind), "unfair": partial(seconds, False, kind)}
        ratios[kind] = [times["fair"] / times["unfair"] for times in paired(acts, rounds)]
    for engine in engines.values():
        engine.llm_engine.engine_core.shutdown(timeout=30.0)
    print("\ntime with fair shares / without (median, least to most of all rounds)")
    for kind, found in ratios.items():
        print(f"{kind}: {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f})")
    return ratios


def main() -> None:
    """Runs the benchmark and prints its tables."""
    from tests.serving.server import VllmServer
    from tests.serving.tiny_models import write_llama

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load, in each round")
    parser.add_argument("--clients", type=int, default=4, help="of the victim")
    parser.add_argument("--slowdown", default="1.5", help="--multilora-fair-slowdown")
    parser.add_argument("--server", action="append", choices=SERVERS, help="only this one")
    parser.add_argument(
        "--only", choices=("cost", "servers"), help="what fair shares cost, or what they are for"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    settings = {
        "fair": ["--multilora-fair-shares", "--multilora-fair-slowdown", options.slowdown],
        "unfair": [],
        "stock": [],
    }
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        small = write_llama(scratch / "small", positions=1024)
        costs = {}
        if options.only != "servers":
            costs = cost(small, write_adapters(small, scratch / "for-small"), options.rounds)
        if options.only == "cost":
            return
        base = write_base(scratch / "base")
        adapters = write_adapters(base, scratch)
        servers = {
            name: stack.enter_context(
                VllmServer(
                    base,
                    *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "512"),
                    *("--max-num-seqs", str(PLACES), "--no-enable-prefix-caching"),
                    *("--max-num-batched-tokens", str(STEP_TOKENS)),
                    *("--enable-lora", "--max-loras", str(len(adapters))),
                    *("--max-lora-rank", str(RANK)),
                    *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
                    *settings[name],
                    log=scratch / f"{name}.log",
                    start_timeout=600.0,
                    env={"VLLM_PLUGINS": "none"} if name == "stock" else {},
                )
            )
            for name in options.server or SERVERS
        }
        try:
            figures = run(options, {name: server.url for name, server in servers.items()})
        except Exception:
            for server in servers.values():
                print(server.log_tail(), file=sys.stderr)
            raise
    results = report(figures)
    if options.json:
        options.json.write_text(
            json.dumps({"medians": results, "rounds": figures, "costs": costs}, indent=2)
        )


if __name__ == "__main__":
    main()
