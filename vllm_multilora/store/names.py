"""The adapter names that the API servers of one server share: all serve what one registers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from vllm_multilora.store.messages import Publish, Published, Retract, Retracted, Settled

PATIENCE_S = 2.0
"""Seconds for which an API server that does not answer holds another one's registration up."""


class Send(Protocol):
    """Sends messages to clients."""

    def send(self, client: int, message: msgspec.Struct) -> None:
        """Sends one."""


@dataclass
class _Server:
    """One server's names, and its API servers."""

    members: set[int] = field(default_factory=set)
    names: dict[str, Publish] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """A change that not all API servers have seen."""

    client: int
    request: int
    unseen: set[int]
    deadline: float


class Names:
    """Passes names on, and tells who published one when all others have seen it.

    Without I/O or clock: the caller passes the time.

    Args:
        effects: Sends.
    """

    def __init__(self, effects: Send) -> None:
        self._effects = effects
        self._servers: dict[str, _Server] = {}
        self._home: dict[int, _Server] = {}
        self._changes: dict[int, _Change] = {}
        self._serials = itertools.count(1)

    def join(self, client: int, server: str) -> None:
        """An API server has come; it is told all names that there are."""
        home = self._home[client] = self._servers.setdefault(server, _Server())
        home.members.add(client)
        for publish in home.names.values():
            self._effects.send(client, _published(0, publish))

    def leave(self, client: int) -> None:
        """An API server has gone; its names stay as long as any other of its server is there."""
        home = self._home.pop(client, None)
        if home is None:
            return
        home.members.discard(client)
        for name in [n for n, other in self._servers.items() if not other.members]:
            del self._servers[name]
        for serial in list(self._changes):
            self.saw(client, serial)

    def publish(self, client: int, message: Publish, now: float) -> None:
        """A name leads to an adapter, or to another version of it, from now on."""
        if (home := self._home.get(client)) is not None:
            home.names[message.name] = message
            serial = next(self._serials)
            self._spread(client, message.request, serial, _published(serial, message), now)

    def retract(self, client: int, message: Retract, now: float) -> None:
        """A name leads nowhere any more."""
        if (home := self._home.get(client)) is not None:
            home.names.pop(message.name, None)
            serial = next(self._serials)
            self._spread(client, message.request, serial, Retracted(serial, message.name), now)

    def saw(self, client: int, serial: int) -> None:
        """An API server has taken a change in."""
        change = self._changes.get(serial)
        if change is None:
            return
        change.unseen.discard(client)
        if not change.unseen:
            self._settle(serial)

    def tick(self, now: float) -> None:
        """Gives up on API servers that have not answered for long."""
        for serial in [s for s, change in self._changes.items() if change.deadline <= now]:
            self._settle(serial)

    def next_event(self) -> float | None:
        """When `tick` has something to do; None: never."""
        return min((change.deadline for change in self._changes.values()), default=None)

    def _spread(
        self, client: int, request: int, serial: int, message: msgspec.Struct, now: float
    ) -> None:
        others = self._home[client].members - {client}
        for other in others:
            self._effects.send(other, message)
        self._changes[serial] = _Change(client, request, others, now + PATIENCE_S)
        if not others:
            self._settle(serial)

    def _settle(self, serial: int) -> None:
        change = self._changes.pop(serial)
        self._effects.send(change.client, Settled(change.request))


def _published(serial: int, publish: Publish) -> Published:
    return Published(serial, publish.name, publish.adapter, publish.path, publish.details)
