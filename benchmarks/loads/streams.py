"""Two streams that generate all the time, and what they notice of requests beside them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

STREAM_TOKENS, STREAM_PROMPT = 1500, 32
WARM_UP_TOKENS = 5
PROMPT_TOKENS, NEW_TOKENS = 16, 8
TOKENS_WITHOUT_REQUESTS = NEW_TOKENS + 2
"""Tokens that the streams generate without other requests, per request of other phases."""


@dataclass(frozen=True)
class Phase:
    """What one phase of one round has shown.

    Attributes:
        gaps_ms: Time between two tokens of a stream, both streams'.
        first_token_ms: Time to first token of each request beside the streams.
        registration_ms: The part of it that its registration took.
        answers: Statuses of registrations that were refused, by what was wrong.
    """

    gaps_ms: list[float]
    first_token_ms: list[float] = field(default_factory=list)
    registration_ms: list[float] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)

    def quantile(self, share: float) -> float:
        """The gap that a share of all gaps is not longer than."""
        ordered = sorted(self.gaps_ms)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Streams:
    """Sends a server's requests.

    Args:
        client: Of the server.
        models: What the streams ask for.
        vocabulary: Tokens of prompts are numbers below this.
    """

    def __init__(self, client: httpx.AsyncClient, models: tuple[str, ...], vocabulary: int) -> None:
        self._client = client
        self._models = models
        self._vocabulary = vocabulary
        self._numbers = random.Random(0)
        self._arrived = 0  # tokens of streams

    async def phase(self, beside: Callable[[Phase], Awaitable[None]]) -> Phase:
        """Has the streams run while `beside` does, which notes its own times in the phase."""
        times: list[list[float]] = [[] for _ in self._models]
        streams = [
            asyncio.create_task(self._generate(model, arrivals))
            for model, arrivals in zip(self._models, times, strict=True)
        ]
        phase = Phase([])
        try:
            await _until(lambda: min(map(len, times)) > WARM_UP_TOKENS)
            begin = time.perf_counter()
            await beside(phase)
            end = time.perf_counter()
            if any(stream.done() for stream in streams):
                raise RuntimeError("a stream ended before its phase: raise STREAM_TOKENS")
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
        for arrivals in times:
            phase.gaps_ms.extend(
                1000 * (after - before)
                for before, after in pairwise(arrivals)
                if begin <= after <= end
            )
        return phase

    async def quiet(self, requests: int) -> Phase:
        """A phase without other requests, about as long as one with so many."""

        async def wait(phase: Phase) -> None:
            enough = self._arrived + len(self._models) * requests * TOKENS_WITHOUT_REQUESTS
            await _until(lambda: self._arrived >= enough)

        return await self.phase(wait)

    async def request(self, model: str) -> float:
        """Has a request answered; when its first token came."""
        first, *_ = [t async for t in self._tokens(model, PROMPT_TOKENS, NEW_TOKENS)]
        return first

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """POSTs a body; whatever the answer is."""
        return await self._client.post(path, json=body)

    async def register(self, name: str, path: str) -> None:
        """Registers an adapter."""
        body = {"lora_name": name, "lora_path": path}
        response = await self.post("/v1/load_lora_adapter", body)
        if response.is_error:
            raise RuntimeError(f"{name}: {response.status_code} {response.text}")

    async def unload(self, name: str) -> None:
        """Unloads an adapter."""
        response = await self.post("/v1/unload_lora_adapter", {"lora_name": name})
        if response.is_error:
            raise RuntimeError(f"{name}: {response.status_code} {response.text}")

    async def _generate(self, model: str, arrivals: list[float]) -> None:
        async with aclosing(self._tokens(model, STREAM_PROMPT, STREAM_TOKENS)) as tokens:
            async for arrived in tokens:
                arrivals.append(arrived)
                self._arrived += 1

    def _tokens(self, model: str, prompt: int, count: int) -> AsyncGenerator[float, None]:
        body = {
            "model": model,
            "prompt": [self._numbers.randrange(self._vocabulary) for _ in range(prompt)],
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        return token_times(self._client, body)


async def token_times(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> AsyncGenerator[float, None]:
    """Has a completion streamed; when each of its tokens came.

    Raises:
        RuntimeError: It is refused, or ends with an error.
    """
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            await response.aread()
            raise RuntimeError(f"{body['model']}: {response.status_code} {response.text}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if '"error"' in line:
                    raise RuntimeError(f"{body['model']}: {line}")
                yield time.perf_counter()


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)
