"""Requests to an engine in this process, and when their tokens came.

Nothing of HTTP or of other processes is between the clock and the engine: its steps are made here.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.loads.smollm2 import base_model
from tests.serving.engine import running_engine

_IDLE_S = 0.0005
_NUMBERS = itertools.count()


@dataclass
class Ask:
    """A request.

    Attributes:
        adapter: The `LoRARequest`; None for the base model.
        prompt: Its tokens.
        new_tokens: To generate.
        arrives_s: Seconds after the beginning; 0 where clients ask one after another.
        begin_s: When it arrived, by `time.perf_counter`.
        tokens_s: When each token came.
    """

    adapter: Any
    prompt: list[int]
    new_tokens: int
    arrives_s: float = 0.0
    begin_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)

    @property
    def first_token_ms(self) -> float:
        return 1000 * (self.tokens_s[0] - self.begin_s)


def ask(adapter: Any, prompt_tokens: int, new_tokens: int, dice: random.Random) -> Ask:
    """A request with a prompt that nobody has sent before."""
    return Ask(adapter, [dice.randrange(1000, 40_000) for _ in range(prompt_tokens)], new_tokens)


@contextlib.contextmanager
def smollm2(*, adapters: int = 0, max_rank: int = 64, **settings: Any) -> Iterator[Any]:
    """An engine of SmolLM2 in bfloat16 in this process.

    Args:
        adapters: Slots; LoRA is off where there are none.
        max_rank: Of adapters.
        **settings: Of `LLM`, over those here.
    """
    from benchmarks.steps.cpu_throughput import fastest_dtype

    chosen = {
        "dtype": fastest_dtype(),
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "enable_lora": adapters > 0,
        "max_loras": max(1, adapters),
        "max_cpu_loras": max(1, adapters),
        "max_lora_rank": max_rank,
    }
    with running_engine(base_model(), in_process=True, **(chosen | settings)) as llm:
        yield llm


def serve(
    llm: Any,
    asks: Sequence[Ask],
    *,
    clients: int | None = None,
    arrived: Callable[[Ask], None] = lambda one: None,
) -> float:
    """Has requests answered; notes in each when its tokens came.

    Args:
        llm: The engine.
        asks: In the order of their arrival.
        clients: So many clients ask, each for the next request when it has its answer; without,
            requests arrive at their own times, whatever the engine does.
        arrived: Is told of each request just before the engine gets it.

    Returns:
        Seconds from the first arrival to the last token.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    waiting, running = list(reversed(asks)), dict[str, Ask]()
    began = time.perf_counter()
    while waiting or running:
        now = time.perf_counter()
        while waiting and (
            len(running) < clients if clients else began + waiting[-1].arrives_s <= now
        ):
            one = waiting.pop()
            one.begin_s = now if clients else began + one.arrives_s
            arrived(one)
            name = f"request-{next(_NUMBERS)}"
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=one.new_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            prompt = {"prompt_token_ids": one.prompt}
            engine.add_request(name, prompt, sampling, lora_request=one.adapter)
            running[name] = one
        outputs = engine.step() if running else []
        now = time.perf_counter()
        for output in outputs:
            for each in output.outputs:
                running[output.request_id].tokens_s += [now] * len(each.token_ids)
            if output.finished:
                done = running.pop(output.request_id)
                if len(done.tokens_s) != done.new_tokens:
                    raise RuntimeError(f"{done.adapter}: {len(done.tokens_s)} tokens came")
        if not outputs:
            time.sleep(_IDLE_S)  # for those who load adapters
    return time.perf_counter() - began


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that a share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def power_law(count: int, exponent: float = 1.0) -> list[float]:
    """Weights of so many adapters, the most popular first."""
    return [1 / rank**exponent for rank in range(1, count + 1)]


def requests_of(folders: Sequence[Path]) -> list[Any]:
    """A `LoRARequest` for each adapter; its number is its place, from 1 on."""
    from vllm.lora.request import LoRARequest

    return [LoRARequest(path.name, n, str(path)) for n, path in enumerate(folders, 1)]
