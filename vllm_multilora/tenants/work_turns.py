"""Turns of tenants for what few threads do, one thing after the other as it comes."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextvars import copy_context
from functools import partial
from typing import Any


def take_turns(executor: Executor, owner_of: Callable[..., str]) -> Callable[[], None]:
    """Has an executor work for one owner after the other, and for each in the order of its work.

    Work has the context variables of who submits it.

    Args:
        executor: Takes work from any thread.
        owner_of: Whose work is, by its arguments; asked by who submits it.

    Returns:
        To be called when the executor has other threads: has these do what none has begun.
    """
    turns = _WorkTurns(executor.submit, owner_of)
    executor.submit = turns.submit  # type: ignore[method-assign]
    return turns.begin_again


class _WorkTurns:
    def __init__(self, submit: Callable[..., Any], owner_of: Callable[..., str]) -> None:
        self._submit = submit
        self._owner_of = owner_of
        self._lock = threading.Lock()
        # By owner, whose turn comes first is first.
        self._lines: OrderedDict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As an executor's."""
        result: Future[Any] = Future()
        in_context = partial(copy_context().run, work, *args, **kwargs)
        owner = self._owner_of(*args, **kwargs)
        with self._lock:
            self._lines.setdefault(owner, deque()).append((result, in_context))
        self._submit(self._work)
        return result

    def begin_again(self) -> None:
        """As what `take_turns` returns."""
        with self._lock:
            left = sum(map(len, self._lines.values()))
        for _ in range(left):
            self._submit(self._work)

    def _work(self) -> None:
        with self._lock:
            if not self._lines:
                return  # other threads have done it all
            owner, line = next(iter(self._lines.items()))
            result, work = line.popleft()
            self._lines.move_to_end(owner)
            if not line:
                del self._lines[owner]
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(work())
        except BaseException as error:  # which those are told who wait for the result
            result.set_exception(error)
        finally:
            # The error has this function's variables, which would hold it in turn: all that the
            # work had would stay until Python looks for circles.
            del result, work
