"""Requests to `/v1/completions`, and when their tokens arrived."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from vllm_multilora.toolbox.clients.http_client import UnreachableError
from vllm_multilora.wording import counted

_TIMEOUT_S = 300.0
_POLL_S = 0.002
# Numbers of tokens that every vocabulary has.
_TOKENS = range(20, 250)


@dataclass(frozen=True)
class Ask:
    """A request.

    Attributes:
        prompt_tokens: Tokens of its prompt, which nobody has sent before.
        new_tokens: To generate; exactly so many are.
        delay_s: Seconds after the others' beginning.
    """

    model: str
    prompt_tokens: int
    new_tokens: int
    delay_s: float = 0.0


@dataclass
class Answer:
    """When a request was sent and each token came, by `time.perf_counter`."""

    ask: Ask
    begin_s: float = 0.0
    tokens_s: list[float] = field(default_factory=list)

    @property
    def first_token_s(self) -> float:
        """Seconds to the first token."""
        return self.tokens_s[0] - self.begin_s


class Completions:
    """Asks a server; the seed is that of the prompts."""

    def __init__(self, url: str, api_key: str | None = None, seed: int | None = None) -> None:
        self._url = urlsplit(url)
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._dice = random.Random(seed)

    def together(self, asks: Sequence[Ask]) -> list[Answer]:
        """Sends requests at their times and waits for all answers.

        Raises:
            UnreachableError: One is refused or ends with an error.
        """
        streams = self._start(asks)
        for stream in streams:
            stream.finish()
        return [stream.answer for stream in streams]

    def beside(
        self, asks: Sequence[Ask], late: Sequence[Sequence[Ask]]
    ) -> tuple[list[Answer], list[list[Answer]]]:
        """Sends requests, and while they generate others, one lot after the other.

        Args:
            asks: Long enough for the others; cut short when these have been answered, and the step
                that had the last of them has ended for the first ones, too.
            late: The others; those of a lot are sent together.

        Raises:
            UnreachableError: One of the others fails, or the first ones do before they generate.
        """
        streams = self._start(asks)
        try:
            for stream in streams:
                while len(stream.answer.tokens_s) < 2 and stream.is_alive():
                    time.sleep(_POLL_S)
                if not stream.is_alive():
                    stream.finish()
            answers = [self.together(lot) for lot in late]
            end = time.perf_counter()
            for stream in streams:
                while stream.answer.tokens_s[-1] < end and stream.is_alive():
                    time.sleep(_POLL_S)
        finally:
            for stream in streams:
                stream.stop()
        return [stream.answer for stream in streams], answers

    def _start(self, asks: Sequence[Ask]) -> list[_Stream]:
        begin = time.perf_counter()
        streams = [_Stream(self, ask, begin + ask.delay_s) for ask in asks]
        for stream in streams:
            stream.start()
        return streams

    def body(self, ask: Ask) -> bytes:
        """What is sent for a request."""
        content = {
            "model": ask.model,
            "prompt": self._dice.choices(_TOKENS, k=ask.prompt_tokens),
            "max_tokens": ask.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            # Several tokens may come at once.
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        return json.dumps(content).encode()

    def send(self, body: bytes) -> http.client.HTTPConnection:
        """Sends a request; its answer comes on the connection."""
        is_safe = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if is_safe else http.client.HTTPConnection
        connection = kind(self._url.netloc, timeout=_TIMEOUT_S)
        connection.request("POST", f"{self._url.path}/v1/completions", body, self._headers)
        return connection


class _Stream(threading.Thread):
    """One request on its way."""

    def __init__(self, completions: Completions, ask: Ask, begin_s: float) -> None:
        super().__init__(daemon=True)
        self.answer = Answer(ask, begin_s)
        self._completions = completions
        self._body = completions.body(ask)
        self._error: str | None = None
        self._is_stopped = False

    def run(self) -> None:
        time.sleep(max(0.0, self.answer.begin_s - time.perf_counter()))
        try:
            with closing(self._completions.send(self._body)) as connection:
                self._read(connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._error = self._error or str(error)

    def _read(self, response: http.client.HTTPResponse) -> None:
        if response.status != 200:
            self._error = f"{response.status} {response.read()[:200].decode(errors='replace')}"
            return
        for line in response:
            if self._is_stopped:
                return
            if line.startswith(b"data: {"):
                self._take(json.loads(line[6:]))
        if len(self.answer.tokens_s) != self.answer.ask.new_tokens:
            self._error = self._error or f"{counted(len(self.answer.tokens_s), 'token')} came"

    def _take(self, event: dict[str, object]) -> None:
        now = time.perf_counter()
        usage = event.get("usage")
        if "error" in event or not isinstance(usage, dict):
            self._error = f"an event of the stream is {str(event)[:200]}"
        else:
            new = usage["completion_tokens"] - len(self.answer.tokens_s)
            self.answer.tokens_s += [now] * new

    def finish(self) -> None:
        """Waits for the answer."""
        self.join()
        if self._error is not None:
            raise UnreachableError(f"a request for {self.answer.ask.model} failed: {self._error}")

    def stop(self) -> None:
        """Takes no more tokens."""
        self._is_stopped = True
        self.join()
