"""Versions of an adapter with which running requests go on, given as tensors."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ..engine import greedy, running_async_engine
from ..models.cases import Scenario
from ..slots.test_offline_calls import case_of
from .pushes import EXTENSION, NUMBER, folders_in_memory, memory, pushed, versions_of
from .test_swaps_under_load import GROWTH, LIMIT_S, STREAMS, VERSIONS

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

    from ..models.peft_reference import PeftReference

pytestmark = pytest.mark.serving

NEW_TOKENS = 60
BLOCK_SIZE = 32
MAX_CHECKED = 150
"""Answers of more than one version that are compared with PEFT."""


@pytest.fixture
def engine(llama: Scenario, monkeypatch: pytest.MonkeyPatch) -> "Iterator[AsyncLLM]":
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    options = {"max_num_seqs": STREAMS, "block_size": BLOCK_SIZE, "worker_extension_cls": EXTENSION}
    with running_async_engine(llama.base, max_loras=2, max_cpu_loras=6, **options) as running:
        yield running


@pytest.fixture
def names(llama: Scenario) -> list[str]:
    return [*llama.adapters][:VERSIONS]


@pytest.fixture
def peft(llama: Scenario, names: list[str]) -> "PeftReference":
    from ..models.peft_reference import PeftReference

    return PeftReference(llama.base, {name: llama.adapters[name] for name in names})


class Reported(NamedTuple):
    """An answer's tokens, and the version that has computed each token but the last."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    versions: list[str]


def reported_by(output: "RequestOutput", names: Sequence[str]) -> Reported:
    """What is kept of an output, whose own objects would count as growth."""
    prompt, found = output.prompt_token_ids or (), output.outputs[0].token_ids
    return Reported(tuple(prompt), tuple(found), versions_of(output, names))


async def answer(engine: "AsyncLLM", prompt: Sequence[int], name: str) -> "RequestOutput":
    """The last output of a request for the adapter."""
    tokens: Any = {"prompt_token_ids": list(prompt)}
    options = greedy(max_tokens=NEW_TOKENS)
    outputs = engine.generate(tokens, options, name, lora_request=pushed())
    return [output async for output in outputs][-1]


@pytest.mark.parametrize("swaps", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_running_answers_go_on_with_each_version_from_the_token_they_say(
    engine: "AsyncLLM",
    llama: Scenario,
    names: list[str],
    peft: "PeftReference",
    swaps: int,
) -> None:
    prompt = list(case_of(llama, names[0]).prompt)
    numbers, mixed, sizes = itertools.count(), list[Reported](), list[int]()
    before_all = {*folders_in_memory()}

    async def push(swap: int) -> None:
        folder = llama.adapters[names[swap % VERSIONS]]
        assert await engine.collective_rpc("push_in_flight", args=(NUMBER, folder)) == [True]

    async def stream(ended: asyncio.Event) -> None:
        while not ended.is_set():
            output = await answer(engine, prompt, f"request {next(numbers)}")
            if len({*(reported := reported_by(output, names)).versions}) > 1:
                mixed.append(reported)

    async def run() -> "RequestOutput":
        ended = asyncio.Event()
        await push(0)
        streams = [asyncio.create_task(stream(ended)) for _ in range(STREAMS)]
        for swap in range(1, swaps):
            await push(swap)
            await asyncio.sleep(0.01)
            if swap % (swaps // 4) == 0:
                sizes.append(memory())
            assert not any(task.done() for task in streams), [
                t.exception() for t in streams if t.done()
            ]
        ended.set()
        await asyncio.gather(*streams)
        # What two versions have computed is not found by a request that begins like it.
        longer = [*prompt, *mixed[-1].answer[:20]]
        return await answer(engine, longer, "longer")

    longer = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    assert len(mixed) >= STREAMS, "no swap has come while requests ran"
    last = reported_by(longer, names)
    for reported in [*mixed[:: len(mixed) // MAX_CHECKED + 1], last]:
        tokens = (*reported.prompt, *reported.answer)[:-1]
        chosen = peft.likeliest_in_turn(tokens, reported.versions)
        assert tuple(chosen[-len(reported.answer) :]) == reported.answer, reported.versions
    assert {*last.versions} == {names[(swaps - 1) % VERSIONS]}
    assert len({*folders_in_memory()} - before_all) == 1
    assert max(sizes) - sizes[0] < GROWTH, sizes


def test_a_push_that_follows_another_version_is_refused(
    engine: "AsyncLLM", llama: Scenario, names: list[str]
) -> None:
    first, second = (llama.adapters[name] for name in names[:2])
    prompt = case_of(llama, names[0]).prompt

    async def run() -> "RequestOutput":
        await engine.collective_rpc("push_in_flight", args=(NUMBER, first))
        with pytest.raises(Exception, match=r"found version .*, expected 0{8}"):
            await engine.collective_rpc("push_in_flight", args=(NUMBER, second, "00000000"))
        return await answer(engine, prompt, "after")

    output = asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    expected = case_of(llama, names[0]).expected.tokens
    assert tuple(output.outputs[0].token_ids[: len(expected)]) == expected
    assert {*versions_of(output, names)} == {names[0]}
