"""Stored responses can be read only by those who created them, and count while they are made.

vLLM keeps responses, their messages, events and tasks by id, for whoever has the id, and clients
may choose ids. It never removes one. Where tenants are set, each of them has ids of its own, its
oldest responses give way to new ones, and all of them go with its account.

A response in the background is made by a task, after the call that asked for it has been answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.callers import current_account, current_caller
from vllm_multilora.tenants.limits import Account

MOST_KEPT = 1_024
"""Responses of one tenant that are kept: those that it asked for last."""

MOST_KEPT_BYTES = 128 << 20
"""Of what they take: the bodies of the calls that asked for them and of those that these go on
with, all of which they may hold, and what was answered."""

_TOKEN_BYTES, _EVENT_BYTES, _SCORE_BYTES = 16, 1_300, 730
"""Of a token in a response, of an event that tells of one, and of a log probability in either."""

_Kept = dict[str, tuple[Any, int]]
"""Values by their keys, and how many bytes each takes."""


class OwnedMapping(MutableMapping[str, Any]):
    """A mapping in which every tenant has keys of its own, as have all others together.

    Args:
        most: Values that are kept for a tenant: its oldest give way to a new one. None: all.
        most_bytes: That they take together; one value is kept in any case.
    """

    def __init__(self, most: int | None = None, most_bytes: int = 0) -> None:
        self._of_tenants: WeakKeyDictionary[Account, _Kept] = WeakKeyDictionary()
        self._of_others: _Kept = {}
        self._most, self._most_bytes = most, most_bytes

    def __getitem__(self, key: str) -> Any:
        return self._own()[key][0]

    def __setitem__(self, key: str, value: Any) -> None:
        values, caller = self._own(), current_caller.get()
        values[key] = value, (0 if caller is None else caller.body_bytes) + _answer_bytes(value)
        if self._most is None or values is self._of_others:
            return
        held = sum(map(self._bytes, values.values()))
        while len(values) > self._most or (held > self._most_bytes and len(values) > 1):
            held -= self._bytes(values.pop(next(iter(values))))

    def _bytes(self, kept: tuple[Any, int]) -> int:
        return kept[1]

    def __delitem__(self, key: str) -> None:
        del self._own()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._own()))

    def __len__(self) -> int:
        return len(self._own())

    def _own(self) -> _Kept:
        account = current_account()
        if account is None:
            return self._of_others
        return self._of_tenants.setdefault(account, {})


class Messages(OwnedMapping):
    """What was said; who goes on with a response keeps all that was said before."""

    def __getitem__(self, key: str) -> Any:
        value, size = self._own()[key]
        if (caller := current_caller.get()) is not None:
            caller.body_bytes += size
        return value


class Events(OwnedMapping):
    """What is told of responses in streams, with what says that there is more of it."""

    def _bytes(self, kept: tuple[Any, int]) -> int:
        (events, _), size = kept
        scores = _scores_of_token(getattr(events[0], "response", None)) if events else 0
        return size + len(events) * (_EVENT_BYTES + _SCORE_BYTES * scores)


class BackgroundTasks(OwnedMapping):
    """The tasks that make responses; what a tenant's limits count is in use until they are done."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if (caller := current_caller.get()) is not None:
            caller.works_on(value)


def _answer_bytes(value: Any) -> int:
    """Bytes of what a response holds of answers, if it is one and has been made."""
    usage = getattr(value, "usage", None)
    if usage is None:
        return 0
    return int(usage.output_tokens) * (_TOKEN_BYTES + _SCORE_BYTES * _scores_of_token(value))


def _scores_of_token(response: Any) -> int:
    """How many log probabilities come with each token of a response."""
    most = getattr(response, "top_logprobs", None)
    return 0 if most is None else int(most) + 1


def init_responses(
    original: Callable[..., None], self: Any, engine_client: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, engine_client, *args, **kwargs)
    vllm_config = getattr(engine_client, "vllm_config", None)
    if vllm_config is None or settings_of(vllm_config).tenants is None:
        return
    self.response_store = OwnedMapping(MOST_KEPT, MOST_KEPT_BYTES)
    # A response's messages and events are kept before it is, and have to be there while it is.
    self.msg_store = Messages(2 * MOST_KEPT, 2 * MOST_KEPT_BYTES)
    self.event_store = Events(2 * MOST_KEPT, 2 * MOST_KEPT_BYTES)
    self.background_tasks = BackgroundTasks()
