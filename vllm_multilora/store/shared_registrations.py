"""The adapter names that the API servers of one server share: all serve what one registers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from vllm_multilora.store.loads.loads import Effects
from vllm_multilora.store.protocol.messages import Publish, Published, Retract, Retracted, Settled

PATIENCE_S = 2.0
"""Seconds for which an API server that does not answer holds another one's registration up."""

MAX_GONE = 4096
"""Adapters that have lost their names last, of which API servers are told when they come."""


@dataclass
class _Server:
    """One server's API servers, its names, and adapters that have lost theirs, the newest last.

    Attributes:
        peers: How many there are to be, as those say that were at a store which has died.
        come: The processes of those that have come, which may have gone again.
    """

    members: set[int] = field(default_factory=set)
    peers: int = 0
    come: set[int] = field(default_factory=set)
    names: dict[str, Publish] = field(default_factory=dict)
    gone: dict[int, Retracted] = field(default_factory=dict)

    def holds(self, change: Published | Retracted) -> bool:
        """Whether a change has not been replaced by another one."""
        if isinstance(change, Retracted):
            return True  # for ever
        now = self.names.get(change.name)
        return now is not None and now.adapter == change.adapter

    def withdraw(self, name: str, adapter: int) -> None:
        if name in self.names and self.names[name].adapter == adapter:
            del self.names[name]
        self.gone[adapter] = Retracted(0, name, adapter)
        if len(self.gone) > MAX_GONE:
            del self.gone[next(iter(self.gone))]


@dataclass(frozen=True)
class _Change:
    """A change that not all API servers have seen."""

    home: _Server
    client: int
    request: int
    message: Published | Retracted
    unseen: set[int]
    deadline: float

    @property
    def is_seen(self) -> bool:
        return not self.unseen and len(self.home.come) >= self.home.peers


class PublishedNames:
    """Passes names on, and tells who published one when all have seen it.

    Every API server hears all changes, its own among them, in the order in which they were made
    here, and so all end with the same names. Without I/O or clock: the caller passes the time.
    """

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        self._servers: dict[str, _Server] = {}
        self._home: dict[int, _Server] = {}
        self._changes: dict[int, _Change] = {}
        self._serials = itertools.count(1)

    def join(self, client: int, server: str, pid: int, peers: int = 0) -> None:
        """An API server has come; it is told of all names, and of adapters that have lost theirs.

        When a store has died, its API servers come to the next one at different times. Whoever is
        late may serve, and publish again, what others have replaced or retracted by then; what
        they change meanwhile is settled only when it has come and has seen that.
        """
        home = self._home[client] = self._servers.setdefault(server, _Server())
        home.members.add(client)
        home.come.add(pid)
        home.peers = max(home.peers, peers)
        for publish in home.names.values():
            self._effects.send(client, _published(0, publish))
        for retracted in home.gone.values():
            self._effects.send(client, retracted)
        if len(home.come) > home.peers:
            return
        for serial, change in list(self._changes.items()):
            if change.home is not home:
                continue
            if home.holds(change.message):
                change.unseen.add(client)
                self._effects.send(client, change.message)
            else:
                self.saw(client, serial)  # it has been told of what holds instead

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
        home = self._home.get(client)
        if home is None:
            return
        before = home.names.get(message.name)
        if message.adapter in home.gone or (message.again and before is not None):
            # The client has heard, or will, what holds instead; others may have heard of this from
            # the store that has died, and of nothing since.
            if before is not None and before.adapter != message.adapter:
                home.withdraw(message.name, message.adapter)
                for member in home.members:
                    self._effects.send(member, home.gone[message.adapter])
            self._effects.send(client, Settled(message.request))
            return
        if before is not None and before.adapter != message.adapter:
            home.withdraw(before.name, before.adapter)
        home.names[message.name] = message
        self._spread(client, message.request, _published(next(self._serials), message), now)

    def retract(self, client: int, message: Retract, now: float) -> None:
        home = self._home.get(client)
        if home is None:
            return
        home.withdraw(message.name, message.adapter)
        retracted = Retracted(next(self._serials), message.name, message.adapter)
        self._spread(client, message.request, retracted, now)

    def saw(self, client: int, serial: int) -> None:
        change = self._changes.get(serial)
        if change is None:
            return
        change.unseen.discard(client)
        if change.is_seen:
            self._settle(serial)

    def tick(self, now: float) -> None:
        """Gives up on API servers that have not answered for long."""
        for serial in [s for s, change in self._changes.items() if change.deadline <= now]:
            self._settle(serial)

    def next_event(self) -> float | None:
        """When `tick` has something to do; None: never."""
        return min((change.deadline for change in self._changes.values()), default=None)

    def _spread(
        self, client: int, request: int, message: Published | Retracted, now: float
    ) -> None:
        home = self._home[client]
        for member in home.members:
            self._effects.send(member, message)
        self._changes[message.serial] = _Change(
            home, client, request, message, set(home.members), now + PATIENCE_S
        )

    def _settle(self, serial: int) -> None:
        change = self._changes.pop(serial)
        self._effects.send(change.client, Settled(change.request))


def _published(serial: int, publish: Publish) -> Published:
    return Published(serial, publish.name, publish.adapter, publish.path, publish.details)
