"""What a tenant notices of another with eight times its clients and long prompts beside it.

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

What fair shares cost is measured without servers (`servers=none`: that alone): two engines of a
tiny Llama, with them and without, are given the same requests turn by turn, of one tenant and of
eight. Through HTTP the client and the waiting of vLLM's own processes for each other decide on a
small model's speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.harness.turns import paired
from benchmarks.loads.server import vllm_server
from benchmarks.loads.streams import token_times
from vllm_multilora.config import MultiLoRAConfig

TENANTS = tuple(f"tenant-{number}" for number in range(8))
VICTIM, AGGRESSOR = "victim", "aggressor"
RANK, PLACES, STEP_TOKENS = 16, 64, 2048
SHORT, LONG = 16, 256
NEW_TOKENS = 48
SETTLE_S = 2.0


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
    from tests.serving.models.tiny_models import VOCAB_SIZE

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
    return sum(values) ** 2 / (len(values) * sum(value**2 for value in values))


def run(
    urls: dict[str, str], rounds: int, seconds: float, clients: int
) -> dict[str, dict[str, list[float]]]:
    """All rounds on all servers; each figure of each round, by server."""
    victim = Load(VICTIM, clients, SHORT, streams=True)
    aggressor = Load(AGGRESSOR, 8 * clients, LONG)
    crowd = 2 * PLACES // len(TENANTS)
    loads = {
        "solo": [victim],
        "beside": [victim, aggressor],
        "equal": [Load(tenant, crowd, LONG // 4) for tenant in TENANTS],
    }
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in urls}
    for number in range(-1, rounds):  # the first round warms up, and does not count
        order = list(urls)
        random.Random(number).shuffle(order)
        for kind, asked in loads.items():
            for name in order:
                try:
                    served = asyncio.run(
                        phase(urls[name], asked, seconds if number >= 0 else 2.0, number)
                    )
                    if number >= 0:
                        note(figures[name], kind, served, SETTLE_S + seconds)
                except Exception as error:
                    raise RuntimeError(f"round {number + 1}, {name}, load {kind!r}") from error
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return figures


def note(
    figures: dict[str, list[float]], kind: str, served: dict[str, Served], seconds: float
) -> None:
    """Adds the figures of a phase of so many seconds."""
    is_too_short = kind == "solo" and not served[VICTIM].gaps_ms
    if is_too_short or not any(each.cost for each in served.values()):
        raise RuntimeError("no request was answered in time: raise `seconds`")

    def add(name: str, value: float) -> None:
        figures.setdefault(name, []).append(value)

    if VICTIM in served:
        add(f"{kind} first token", quantile(served[VICTIM].first_ms))
        add(f"{kind} next token", quantile(served[VICTIM].gaps_ms))
    add(f"{kind} cost a second", sum(each.cost for each in served.values()) / seconds)
    if kind == "equal":
        add("jain", jain([each.cost for each in served.values()]))


def figures_of(name: str, values: dict[str, list[float]]) -> Iterable[Figure]:
    """A server's figures; 95th percentiles of the victim's times."""
    for what in ("first token", "next token"):
        solo, beside = values[f"solo {what}"], values[f"beside {what}"]
        yield Figure(name, f"{what}, solo, ms", solo)
        yield Figure(name, f"{what}, beside, ms", beside)
        yield Figure(name, f"{what}, ratio", [b / s for s, b in zip(solo, beside, strict=True)])
    for kind in ("beside", "equal"):
        yield Figure(name, f"cost a second, {kind}", values[f"{kind} cost a second"])
    yield Figure(name, "Jain's index of eight equal tenants", values["jain"])


def write_base(path: Path) -> Path:
    """A model whose steps outweigh what HTTP and Python add to them, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.serving.models.tiny_models import VOCAB_SIZE, write_llama

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
    from tests.serving.models.recipes import AdapterRecipe
    from tests.serving.models.tiny_adapters import write_adapter

    return {
        name: write_adapter(base, folder / name, AdapterRecipe(name, rank=RANK), seed=n)
        for n, name in enumerate((*TENANTS, VICTIM, AGGRESSOR))
    }


def cost(base: Path, adapters: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Time with fair shares over time without, by load and round."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from tests.serving.models.tiny_models import VOCAB_SIZE

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
    return ratios


@benchmark(
    workload="a victim's clients beside eight times as many with prompts 16 times as long",
    control="the victim alone, in the same round; stock vLLM and the plugin without fair shares",
    figure="the victim's 95th percentiles beside the aggressor over those alone",
    compares_to="1, where nothing is noticed, and stock vLLM",
    quick={"rounds": 1, "cost_rounds": 1, "seconds": 8.0, "servers": "fair,unfair"},
)
def fairness(
    rounds: int = 5,
    seconds: float = 20.0,
    clients: int = 4,
    slowdown: float = MultiLoRAConfig.fair_slowdown,
    servers: str = "fair,unfair",
    cost_rounds: int = 5,
) -> Iterable[Figure]:
    """What a tenant notices of another with eight times its clients and long prompts beside it.

    Args:
        rounds: Of all servers.
        seconds: Of each load, in each round.
        clients: Of the victim.
        slowdown: `--multilora-fair-slowdown`.
        servers: Those to run, also `stock`, which needs minutes of `seconds` on a CPU; `none`
            measures what fair shares cost, and nothing else.
        cost_rounds: Of what fair shares cost; 0 for the servers alone.
    """
    from tests.serving.models.tiny_models import write_llama

    settings = {
        "fair": ["--multilora-fair-shares", "--multilora-fair-slowdown", str(slowdown)],
        "unfair": [],
        "stock": [],
    }
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if cost_rounds:
            small = write_llama(scratch / "small", positions=1024)
            small_adapters = write_adapters(small, scratch / "for-small")
            for kind, ratios in cost(small, small_adapters, cost_rounds).items():
                case = "eight equal tenants" if kind == "equal" else "one tenant"
                yield Figure(case, "time with fair shares / without", ratios)
        if servers == "none":
            return
        base = write_base(scratch / "base")
        adapters = write_adapters(base, scratch)
        started = {
            name: stack.enter_context(
                vllm_server(
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
            for name in servers.split(",")
        }
        try:
            figures = run({n: s.url for n, s in started.items()}, rounds, seconds, clients)
        except Exception:
            for server in started.values():
                print(server.log_tail(), file=sys.stderr)
            raise
    for name, values in figures.items():
        yield from figures_of(name, values)
