"""What the examples of fleets share: starting one and ending it, asking it, showing its answers."""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import httpx

sys.path.append(str(Path(__file__).parent / "demo"))

from demo import answers
from processes import Child
from prompts import CUSTOMERS, Customer

BASE = "base"
START_LIMIT_S = 300.0
NEW_TOKENS = 40
SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
"""Environment variables of every vLLM."""

_POLL_S = 0.5


class Fleet:
    """Processes that serve adapters until the block ends.

    Attributes:
        url: Where clients ask.
        main: The process without which nothing works.
    """

    url: str
    main: Child

    def open(self, stack: ExitStack) -> None:
        """Starts all of it; `stack` ends what is put on it."""
        raise NotImplementedError

    def model_of(self, adapter: str) -> str:
        """What clients call an adapter."""
        return adapter

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait(
        self, what: str, condition: Callable[[], bool], limit_s: float = START_LIMIT_S
    ) -> None:
        """Waits until something is true.

        Raises:
            SystemExit: It is not within the limit, or the main process has ended.
        """
        end = time.monotonic() + limit_s
        while not condition():
            self.main.check()
            if time.monotonic() > end:
                self.main.fail(f"has not been ready: no {what} within {limit_s:.0f} s")
            time.sleep(_POLL_S)

    def ask(self, customer: Customer, adapter: str | None = None, **fields: Any) -> httpx.Response:
        """Asks a customer's question of its own adapter, or of another one."""
        adapter = adapter or customer.adapter
        body = {
            "model": self.model_of(adapter) if adapter else BASE,
            "messages": [{"role": "user", "content": customer.prompt}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            **fields,
        }
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=120.0, trust_env=False)


def is_up(url: str) -> bool:
    """Whether something answers there, with status 200."""
    with httpx.Client(trust_env=False) as client:
        return answers(client, url)


def content(answer: httpx.Response) -> str:
    """The text of an answer."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def show(fleet: Fleet) -> None:
    """Asks all customers' questions at once, and prints the answers."""
    with ThreadPoolExecutor(len(CUSTOMERS)) as threads:
        for customer, answer in zip(CUSTOMERS, threads.map(fleet.ask, CUSTOMERS), strict=True):
            print(f"\n{customer.adapter or BASE}: {customer.prompt}\n  {content(answer)!r}")


def read_arguments(description: str) -> Callable[[], None]:
    """Reads the command line; returns what waits for Ctrl-C, unless that says `--once`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end when all questions are answered")
    once = parser.parse_args().once

    def stay() -> None:
        try:
            while not once:
                time.sleep(1)
        except KeyboardInterrupt:
            pass

    return stay
