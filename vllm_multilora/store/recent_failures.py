"""Recent failures, which answer further wants for a while; bounded in number and length."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from vllm_multilora.failures import FailureKind
from vllm_multilora.store.entries import Binding

MOST_FAILURES = 1024
LONGEST_MESSAGE = 4096
MOST_PROBLEMS = 101  # a hundred, and one that counts the others: see `adapters.problems.bounded`
LONGEST_FIELD = 2000
MOST_CHARACTERS = 65_536


@dataclass(frozen=True)
class Failure:
    """Why a load failed.

    Attributes:
        kind: What kind of thing went wrong.
        message: What was found and where.
        problems: What is wrong with the files, each as its fields.
    """

    kind: FailureKind
    message: str
    problems: list[dict[str, Any]]

    def bounded(self) -> Failure:
        """The same in a length that may be kept and sent for every request."""
        problems, left = [], MOST_CHARACTERS
        for problem in self.problems[:MOST_PROBLEMS]:
            told = {
                _cut(str(key), LONGEST_FIELD): value
                if isinstance(value, int)
                else _cut(str(value), LONGEST_FIELD)
                for key, value in problem.items()
            }
            left -= sum(len(key) + len(str(value)) for key, value in told.items())
            if left < 0:
                break
            problems.append(told)
        return Failure(self.kind, _cut(self.message, LONGEST_MESSAGE), problems)


class RecentFailures:
    """The last failure of each adapter, until its time is over."""

    def __init__(self) -> None:
        self._failures: OrderedDict[Binding, tuple[str, float, Failure]] = OrderedDict()

    def remember(self, binding: Binding, path: str, failure: Failure, until: float) -> None:
        self._failures.pop(binding, None)
        self._failures[binding] = path, until, failure
        if len(self._failures) > MOST_FAILURES:
            self._failures.popitem(last=False)

    def find(self, binding: Binding, path: str, now: float) -> Failure | None:
        """The failure that answers a want of this adapter now."""
        known = self._failures.get(binding)
        if known is None:
            return None
        failed_path, until, failure = known
        if failed_path == path and now < until:
            return failure
        del self._failures[binding]
        return None

    def forget_adapter(self, server: str, adapter: int) -> None:
        self._forget(lambda binding: (binding.server, binding.adapter) == (server, adapter))

    def forget_server(self, server: str) -> None:
        self._forget(lambda binding: binding.server == server)

    def _forget(self, is_gone: Any) -> None:
        for binding in [binding for binding in self._failures if is_gone(binding)]:
            del self._failures[binding]


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest - 40]} ... ({len(text) - longest + 40} characters left out)"
