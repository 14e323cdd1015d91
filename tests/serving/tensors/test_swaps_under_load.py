"""Versions of an adapter, given as tensors one after the other while many streams use it."""

import asyncio
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from ..engine import greedy, running_async_engine
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of
from .pushes import EXTENSION, NUMBER, folders_in_memory, memory, pushed

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

pytestmark = pytest.mark.serving

STREAMS = 16
VERSIONS = 5
LIMIT_S = 900.0
GROWTH = 48 << 20
"""Bytes by which memory may grow after the first quarter of the swaps: gaps between what is in use.

A version has 0.44 MB on average: if each were kept, 250 swaps would add 109 MB.
"""


@pytest.fixture
def engine(llama: Scenario, monkeypatch: pytest.MonkeyPatch) -> "Iterator[AsyncLLM]":
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    slots = {"max_loras": 4, "max_cpu_loras": 6, "max_num_seqs": STREAMS}
    with running_async_engine(llama.base, **slots, worker_extension_cls=EXTENSION) as running:
        yield running


@pytest.mark.parametrize("swaps", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_swaps_under_streams_answer_by_version_in_flat_memory(
    engine: "AsyncLLM", llama: Scenario, swaps: int
) -> None:
    """Each answer is that of a version that was in force while its request was begun."""
    names = [*llama.adapters][:VERSIONS]
    cases = [case_of(llama, name) for name in names]
    prompt = list(cases[0].prompt)
    assert all(list(case.prompt) == prompt for case in cases)
    expected = [case.expected.tokens for case in cases]
    assert len({*expected}) == VERSIONS
    before_all = {*folders_in_memory()}  # what engines in this process have left
    begun = done = -1
    beside = answers = 0
    sizes = []
    numbers = itertools.count()

    async def push(swap: int) -> None:
        nonlocal begun, done
        begun = swap
        folder = llama.adapters[names[swap % VERSIONS]]
        assert await engine.collective_rpc("push", args=(NUMBER, folder)) == [True]
        done = swap

    async def stream(ended: asyncio.Event) -> None:
        nonlocal beside, answers
        while not ended.is_set():
            first, last = done, None
            found: tuple[int, ...] = ()
            async for output in engine.generate(
                {"prompt_token_ids": prompt},
                greedy(),
                f"request {next(numbers)}",
                lora_request=pushed(),
            ):
                last = begun if last is None else last
                beside += begun != done
                found = tuple(output.outputs[0].token_ids)
            assert last is not None
            assert last - first < VERSIONS - 1, "any answer would do"
            allowed = {expected[swap % VERSIONS] for swap in range(first, last + 1)}
            assert found in allowed, (first, last, found)
            answers += 1

    async def run() -> None:
        ended = asyncio.Event()
        await push(0)
        streams = [asyncio.create_task(stream(ended)) for _ in range(STREAMS)]
        for swap in range(1, swaps):
            await push(swap)
            before = answers
            while answers < before + STREAMS // 2 and not any(task.done() for task in streams):
                await asyncio.sleep(0.005)
            if swap % (swaps // 4) == 0:
                await engine.collective_rpc("trim")
                sizes.append(memory())
        ended.set()
        await asyncio.gather(*streams)

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    assert beside > swaps, "streams waited while tensors were checked"
    assert len({*folders_in_memory()} - before_all) == 1
    assert max(sizes) - sizes[0] < GROWTH, sizes


def test_tensors_given_to_a_paused_engine_serve_when_it_goes_on(
    engine: "AsyncLLM", llama: Scenario
) -> None:
    """Frameworks pause an engine while they give it a version."""
    first, second = (case_of(llama, name) for name in [*llama.adapters][:2])

    async def give(name: str | None) -> None:
        assert name is not None
        call = engine.collective_rpc("push", args=(NUMBER, llama.adapters[name]))
        assert await asyncio.wait_for(call, LIMIT_S) == [True]

    async def answer(number: int) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        prompt = {"prompt_token_ids": list(first.prompt)}
        async for output in engine.generate(
            prompt, greedy(), f"request {number}", lora_request=pushed()
        ):
            found = tuple(output.outputs[0].token_ids)
        return found

    async def run() -> None:
        await give(first.adapter)
        assert await answer(1) == first.expected.tokens
        await engine.pause_generation(mode="keep")
        await give(second.adapter)
        waiting = asyncio.create_task(answer(2))
        await engine.resume_generation()
        assert await asyncio.wait_for(waiting, LIMIT_S) == second.expected.tokens
        assert NUMBER in await engine.list_loras()

    asyncio.run(run())
