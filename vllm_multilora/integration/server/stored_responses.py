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
"""Of the bodies of the calls that asked for them, all of which they may hold."""

_Kept = dict[str, tuple[Any, int]]
"""Values by their keys, and how large the body of the call is that each is of."""


class OwnedMapping(MutableMapping[str, Any]):
    """A mapping in which every tenant has keys of its own, as have all others together.

    Args:
        most: Values that are kept for a tenant: its oldest give way to a new one. None: all.
        most_bytes: Of their calls' bodies together; one value is kept in any case.
    """

    def __init__(self, most: int | None = None, most_bytes: int = 0) -> None:
        self._of_tenants: WeakKeyDictionary[Account, _Kept] = WeakKeyDictionary()
        self._of_others: _Kept = {}
        self._most, self._most_bytes = most, most_bytes

    def __getitem__(self, key: str) -> Any:
        return self._own()[key][0]

    def __setitem__(self, key: str, value: Any) -> None:
        values, caller = self._own(), current_caller.get()
        values[key] = value, 0 if caller is None else caller.body_bytes
        if self._most is None or values is self._of_others:
            return
        held = sum(size for _, size in values.values())
        while len(values) > self._most or (held > self._most_bytes and len(values) > 1):
            held -= values.pop(next(iter(values)))[1]

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


class BackgroundTasks(OwnedMapping):
    """The tasks that make responses; what a tenant's limits count is in use until they are done."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if (caller := current_caller.get()) is not None:
            caller.works_on(value)


def init_responses(
    original: Callable[..., None], self: Any, engine_client: Any, *args: Any, **kwargs: Any
) -> None:
    original(self, engine_client, *args, **kwargs)
    vllm_config = getattr(engine_client, "vllm_config", None)
    if vllm_config is None or settings_of(vllm_config).tenants is None:
        return
    self.response_store = OwnedMapping(MOST_KEPT, MOST_KEPT_BYTES)
    # A response's messages and events are kept before it is, and have to be there while it is.
    self.msg_store = OwnedMapping(2 * MOST_KEPT, 2 * MOST_KEPT_BYTES)
    self.event_store = OwnedMapping(2 * MOST_KEPT, 2 * MOST_KEPT_BYTES)
    self.background_tasks = BackgroundTasks()
