"""Mixed requests, what their answers say that they have used, and what a server says of it."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from .exposition import values

TOKENS = {
    "prompt_tokens": "vllm:lora_prompt_tokens_total",
    "cached_prompt_tokens": "vllm:lora_cached_prompt_tokens_total",
    "generation_tokens": "vllm:lora_generation_tokens_total",
}
LIMIT_S = 60.0

Usage = Counter[tuple[str, str, str, str]]
"""Tokens by kind, adapter, route and tenant."""


@dataclass(frozen=True)
class User:
    """Who asks for what.

    Attributes:
        model: What is asked for.
        adapter: What that leads to; None: the base model.
        route: The route that it is; empty: none.
        tenant: Whose request it is; empty: nobody's.
        key: The tenant's key.
    """

    model: str
    adapter: str | None
    route: str = ""
    tenant: str = ""
    key: str | None = None

    def tokens(self, kind: str) -> tuple[str, str, str, str]:
        return kind, self.adapter or "", self.route, self.tenant


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        user: Whose.
        path: Where to.
        content: Its body.
        is_given_up: Whether its client goes after the first token.
    """

    user: User
    path: str
    content: dict[str, Any]
    is_given_up: bool = False

    @property
    def prompts(self) -> int:
        prompt = self.content.get("prompt", [0])
        return len(prompt) if isinstance(prompt[0], list) else 1


class Work:
    """Requests of all kinds.

    Args:
        users: Who asks; adapters and the base model.
        plain: Asks for one choice of one prompt only, so that its cached tokens are in its answers.
        leaving: Goes before its answers have ended; its adapter is nobody else's.
        longest: Tokens of a prompt and its answer together.
        seed: Of what is asked.
    """

    def __init__(
        self, users: Sequence[User], plain: User, leaving: User, longest: int, seed: int = 0
    ) -> None:
        self._users = users
        self.plain = plain
        self.leaving = leaving
        self._longest = longest
        self._random = random.Random(seed)
        self._kinds: tuple[Callable[[], Asked], ...] = (
            self._plain,
            self._choices,
            self._stream,
            self._stop,
            self._prompts,
            self._echo,
            self._chat,
            self._given_up,
        )

    def requests(self, number: int) -> list[Asked]:
        """So many, and in their midst one whose choices have no room in memory all together."""
        asked = [self._kinds[i % len(self._kinds)]() for i in range(number)]
        asked.insert(number // 2, self._ask(n=16, max_tokens=self._longest // 2))
        return asked

    def _prompt(self) -> list[int]:
        shared = [3 * n % 97 + 1 for n in range(self._random.choice((0, 32, 64)))]
        most = min(40, self._longest // 2 - len(shared))
        return shared[: self._longest // 2 - 1] + [
            self._random.randrange(1, 100) for _ in range(self._random.randint(1, max(1, most)))
        ]

    def _ask(self, user: User | None = None, **options: Any) -> Asked:
        user = user or self._random.choice(self._users)
        content = {"model": user.model, "prompt": self._prompt(), "ignore_eos": True, "seed": 1}
        tokens = self._random.randint(1, min(48, self._longest // 4))
        return Asked(user, "/v1/completions", content | {"max_tokens": tokens} | options)

    def _plain(self) -> Asked:
        return self._ask(self.plain)

    def _choices(self) -> Asked:
        return self._ask(n=2)

    def _stream(self) -> Asked:
        return self._ask(n=2, stream=True, stream_options={"include_usage": True})

    def _stop(self) -> Asked:
        return self._ask(stop=["t1", "t2 "], max_tokens=min(60, self._longest // 3))

    def _prompts(self) -> Asked:
        return self._ask(prompt=[self._prompt(), self._prompt()])

    def _echo(self) -> Asked:
        return self._ask(echo=True)

    def _chat(self) -> Asked:
        asked = self._ask()
        content = dict(asked.content)
        words = " ".join(f"t{token}" for token in content.pop("prompt"))
        content["messages"] = [{"role": "user", "content": words}]
        return Asked(asked.user, "/v1/chat/completions", content)

    def _given_up(self) -> Asked:
        asked = self._ask(self.leaving, stream=True, max_tokens=self._longest // 3)
        return Asked(asked.user, asked.path, asked.content, is_given_up=True)


def send(url: str, asked: Asked) -> dict[str, Any] | None:
    """Sends a request, over a connection of its own; returns its answer's usage, if it has one."""
    headers = {"Authorization": f"Bearer {asked.user.key}"} if asked.user.key else {}
    with httpx.Client(trust_env=False, timeout=240, headers=headers) as client:
        if asked.is_given_up:
            with client.stream("POST", url + asked.path, json=asked.content) as stream:
                assert stream.status_code == 200
                next(stream.iter_lines())
            return None
        response = client.post(url + asked.path, json=asked.content)
    assert response.status_code == 200, response.text
    if not asked.content.get("stream"):
        return response.json()["usage"]
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    return json.loads(events[-2])["usage"]


def metered(text: str) -> Usage:
    """All tokens that an exposition has."""
    return Counter(
        {
            (kind, *labels): int(value)
            for kind, name in TOKENS.items()
            for labels, value in values(text, name, "lora_name", "route", "tenant").items()
        }
    )


def logged(path: Path, lines: int = 0) -> list[dict[str, Any]]:
    """A usage log, once it has so many lines."""
    deadline = time.monotonic() + LIMIT_S
    while len(found := path.read_text().splitlines()) < lines and time.monotonic() < deadline:
        time.sleep(0.1)
    return [json.loads(line) for line in found]


def of_log(lines: Iterable[dict[str, Any]]) -> Usage:
    """The tokens of a log's lines, without those of the base model."""
    found: Usage = Counter()
    for line in lines:
        if line["adapter"] is not None:
            for kind in TOKENS:
                user = line["adapter"], line["route"] or "", line["tenant"] or ""
                found[(kind, *user)] += line[kind]
    return +found


def assert_adds_up(
    url: str, scrape: Callable[[], str], log: Path, work: Work, number: int
) -> list[dict[str, Any]]:
    """Has requests answered at once: answers, metrics and log have the same sums.

    Returns:
        The lines of the log.
    """
    requests = work.requests(number)
    before, old = metered(scrape()), len(logged(log))
    with ThreadPoolExecutor(24) as pool:
        usages = list(pool.map(lambda asked: send(url, asked), requests))
    expected: Usage = Counter()
    for asked, usage in zip(requests, usages, strict=True):
        if usage is None or asked.user.adapter is None:
            continue
        expected[asked.user.tokens("prompt_tokens")] += usage["prompt_tokens"]
        expected[asked.user.tokens("generation_tokens")] += usage["completion_tokens"]
        if asked.user is work.plain:
            cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
            expected[asked.user.tokens("cached_prompt_tokens")] += cached
    prompts = sum(asked.prompts for asked in requests)
    lines = logged(log, old + prompts)[old:]
    assert len(lines) == prompts
    found = metered(scrape())
    found.subtract(before)
    for user in expected:
        assert found[user] == expected[user], user
    assert found[work.plain.tokens("cached_prompt_tokens")] > 0
    assert of_log(lines) == +found
    left = [line for line in lines if line["adapter"] == work.leaving.adapter]
    assert {line["status"] for line in lines if line not in left} == {"ok"}
    assert {line["status"] for line in left} <= {"ok", "aborted"}
    return lines
