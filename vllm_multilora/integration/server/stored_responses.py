"""Stored responses can be read only by those who created them.

vLLM keeps responses, their messages, events and tasks by id, for whoever has the id, and clients
may choose ids. Where tenants are set, each of them has ids of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.callers import current_tenant


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
    self.background_tasks = OwnedMapping()
