"""What running answers notice of an adapter that is swapped in flight.

SmolLM2-135M in float32, in an engine with a process of its own. Streams of one adapter, each of
which asks again when it has its answer: first in quiet, then while versions of the adapter are
given to the worker as tensors, one after the other. Each answer says which of its tokens are which
version's; answers of several versions are compared with PEFT, which computes each token by the
version that is named for it. An answer is wrong if PEFT clearly prefers another token somewhere.

The wait of a stream is the time between two of its tokens. Memory is that of the engine and of the
folders of tensors, at the end and after a quarter of the swaps.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.smollm2 import base_model, model_config
from benchmarks.steps.cpu_throughput import PROJECTIONS, write_random_adapter
from tests.serving.engine import greedy, running_async_engine
from tests.serving.models.peft_reference import PeftReference
from tests.serving.tensors.pushes import NUMBER, memory, pushed, versions_of

STREAMS, VERSIONS, RANK = 16, 5, 8
PROMPT_TOKENS, NEW_TOKENS = 24, 60
ALPHA = 16 * RANK
"""So that versions answer with other tokens: the weights are small."""

CONFIG = "adapter_config.json"
KEPT = "tests.serving.tensors.tensor_loader.KeptTensors"
"""Has the tensors of a version at hand from its second push on; the first ones come beforehand."""

NEAR_TIE = 0.01
"""Logits within which either of two tokens is right: sums in another order differ by less."""

PAUSE_S = 0.01
"""Between a swap's end and the next one's beginning."""


class Streams:
    """Requests for the adapter, one after the other in each stream.

    Attributes:
        gaps: Seconds between two tokens of a stream.
        mixed: Answers of more than one version.
    """

    def __init__(self, engine: Any, versions: list[str]) -> None:
        self._engine, self._versions = engine, versions
        self._numbers, self._dice = itertools.count(), random.Random(0)
        self.gaps: list[float] = []
        self.mixed: list[Any] = []

    async def answer(self) -> None:
        """Has one request answered."""
        prompt: Any = {"prompt_token_ids": self._dice.choices(range(1000, 40_000), k=PROMPT_TOKENS)}
        name, last, before = f"request {next(self._numbers)}", None, None
        sampling = greedy(max_tokens=NEW_TOKENS)
        async for output in self._engine.generate(prompt, sampling, name, lora_request=pushed()):
            now = time.perf_counter()
            if before is not None:
                self.gaps.append(now - before)
            last, before = output, now
        assert last is not None
        if len({*versions_of(last, self._versions)}) > 1:
            self.mixed.append(last)

    async def run(self, ended: asyncio.Event, count: int) -> None:
        """Has requests answered in so many streams, until it has ended."""

        async def stream() -> None:
            while not ended.is_set():
                await self.answer()

        async with asyncio.TaskGroup() as streams:
            for _ in range(count):
                streams.create_task(stream())

    def take_gaps(self) -> list[float]:
        """The milliseconds from token to token since the last call."""
        gaps, self.gaps = self.gaps, []
        return [1000 * gap for gap in gaps]


async def measured(
    engine: Any, folders: list[Path], swaps: int, streams: int
) -> tuple[list[float], list[float], list[int], list[Any]]:
    """Milliseconds from token to token in quiet and beside swaps, bytes, and mixed answers."""
    numbers = itertools.cycle(folders)
    asked = Streams(engine, [folder.name for folder in folders])

    async def push() -> None:
        await engine.collective_rpc("push_in_flight", args=(NUMBER, next(numbers)))

    async def beside(work: Any) -> list[float]:
        ended = asyncio.Event()
        running = asyncio.create_task(asked.run(ended, streams))
        await work
        ended.set()
        await running
        return asked.take_gaps()

    async def swap_all() -> None:
        for swap in range(1, swaps + 1):
            await push()
            await asyncio.sleep(PAUSE_S)
            if swap in (swaps // 4, swaps):
                sizes.append(memory())

    sizes: list[int] = []
    for _ in folders:
        await push()
    await asked.answer()
    began = time.perf_counter()
    swapping = await beside(swap_all())
    quiet = await beside(asyncio.sleep(time.perf_counter() - began))
    return quiet, swapping, sizes, asked.mixed


def distances(folders: list[Path], answers: Iterable[Any]) -> list[float]:
    """By how many logits PEFT prefers another token to one of an answer's, at most.

    PEFT computes each token by the version that the answer names for it.
    """
    peft = PeftReference(base_model(), {folder.name: folder for folder in folders})
    most = []
    for output in answers:
        found = [*output.outputs[0].token_ids]
        tokens = (*output.prompt_token_ids, *found)[:-1]
        versions = versions_of(output, [folder.name for folder in folders])
        logits = peft.logits_in_turn(tokens, versions)[-len(found) :]
        most.append(float((logits.amax(dim=-1) - logits[range(len(found)), found]).max()))
    return most


@contextmanager
def engine_with_pushes(streams: int) -> Iterator[Any]:
    """An engine whose worker can be given tensors."""
    options = {"max_loras": 2, "max_cpu_loras": 6, "max_num_seqs": streams}
    options["kv_cache_memory_bytes"] = 256 << 20
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
        with running_async_engine(base_model(), worker_extension_cls=KEPT, **options) as engine:
            yield engine


@benchmark(
    workload="16 streams of one adapter of SmolLM2-135M in float32, 24 + 60 tokens each, beside "
    "500 versions given as tensors and swapped in flight",
    control="the same streams in quiet, in the same engine, for the same time",
    figure="the 99th percentile of the time from token to token, divided by that in quiet",
    compares_to="the goal, 1.15; no wrong answer, and no growth",
    quick={"swaps": 8, "streams": 4, "checked": 8},
)
def swaps_in_flight(
    swaps: int = 500, streams: int = STREAMS, checked: int = 150
) -> Iterable[Figure]:
    """What running answers notice of an adapter that is swapped in flight.

    Args:
        swaps: Versions that are given.
        streams: Requests at a time.
        checked: Answers of several versions that are compared with PEFT, at most.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / f"version-{number}" for number in range(VERSIONS)]
        for number, folder in enumerate(folders):
            write_random_adapter(folder, model_config(), RANK, number, PROJECTIONS)
            config = json.loads((folder / CONFIG).read_text()) | {"lora_alpha": ALPHA}
            (folder / CONFIG).write_text(json.dumps(config))
        with engine_with_pushes(streams) as engine:
            quiet, swapping, sizes, mixed = asyncio.run(measured(engine, folders, swaps, streams))
        found = mixed[:: len(mixed) // checked + 1]
        apart = distances(folders, found)
    slowest = [float(np.percentile(gaps, 99)) for gaps in (quiet, swapping)]
    yield Figure("in quiet", "99th percentile from token to token, ms", slowest[:1])
    yield Figure("beside swaps", "99th percentile from token to token, ms", slowest[1:])
    yield Figure("beside swaps", "/ in quiet", [slowest[1] / slowest[0]])
    yield Figure("beside swaps", "growth, MiB", [(sizes[-1] - sizes[0]) / 2**20])
    yield Figure("beside swaps", "answers compared", [float(len(found))])
    yield Figure("beside swaps", "of them wrong", [float(sum(one > NEAR_TIE for one in apart))])
    yield Figure("beside swaps", "furthest from PEFT's choice, logits", [max(apart, default=0.0)])
