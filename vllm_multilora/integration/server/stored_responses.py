"""Stored responses can be read only by those who created them, and count while they are made.

vLLM keeps responses, their messages, events and tasks by id, for whoever has the id, and clients
may choose ids. Where tenants are set, each of them has ids of its own.

A response in the background is made by a task, after the call that asked for it has been answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.callers import current_caller, current_tenant


class OwnedMapping(MutableMapping[str, Any]):
    """A mapping in which every tenant has keys of its own, as have all others together."""

    def __init__(self) -> None:
        self._values: dict[tuple[str | None, str], Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self._values[current_tenant(), key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[current_tenant(), key] = value

    def __delitem__(self, key: str) -> None:
        del self._values[current_tenant(), key]

    def __iter__(self) -> Iterator[str]:
        tenant = current_tenant()
        return (key for owner, key in list(self._values) if owner == tenant)

    def __len__(self) -> int:
        return sum(1 for _ in self)


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
    self.response_store = OwnedMapping()
    self.msg_store = OwnedMapping()
    self.event_store = OwnedMapping()
    self.background_tasks = BackgroundTasks()
