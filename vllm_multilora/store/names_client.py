"""How an API server shares its adapters' names with the others of its server."""

from __future__ import annotations

import itertools
import logging
import os
from typing import TypeAlias

from vllm_multilora.store.channel import Channel, ChannelClosedError
from vllm_multilora.store.launch import StoreHost
from vllm_multilora.store.messages import (
    PROTOCOL,
    FromStore,
    Hello,
    Publish,
    Published,
    Retract,
    Retracted,
    Saw,
    Settled,
)

logger = logging.getLogger(__name__)

Heard: TypeAlias = Published | Retracted | Settled


class NamesClient:
    """A connection for names only; nothing waits for the store.

    A store that has died is started again by the next call, and told the names that this client
    has published.

    Args:
        host: Where the store is.
        server: The same for all API servers of a server.

    Raises:
        StoreUnavailableError: There is no store, and none can be started.
    """

    def __init__(self, host: StoreHost, server: str) -> None:
        self._host = host
        self._hello = Hello(PROTOCOL, "server", server, os.getpid())
        self._requests = itertools.count(1)
        self._own: dict[str, Publish] = {}
        self._channel = self._connect()

    def fileno(self) -> int:
        """The socket, for event loops; another one after the store was started again."""
        return self._channel.fileno()

    def publish(self, name: str, adapter: int, path: str, details: dict[str, str | bool]) -> int:
        """Says where a name leads; returns the number that `Settled` names."""
        message = Publish(next(self._requests), name, adapter, path, details)
        self._own[name] = message
        self._send(message)
        return message.request

    def retract(self, name: str) -> int:
        """Says that a name leads nowhere; returns the number that `Settled` names."""
        self._own.pop(name, None)
        message = Retract(next(self._requests), name)
        self._send(message)
        return message.request

    def saw(self, serial: int) -> None:
        """Says that a change was taken in."""
        self._send(Saw(serial))

    def poll(self) -> list[Heard]:
        """What has come since the last call."""
        try:
            self._channel.flush()
            messages = [message for message, _ in self._channel.receive()]
        except ChannelClosedError as error:
            self._reconnect(error)
            return []
        heard = [m for m in messages if isinstance(m, Published | Retracted | Settled)]
        for message in heard:
            if not isinstance(message, Settled):
                self._own.pop(message.name, None)  # somebody else's from now on
        return heard

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def _send(self, message: Publish | Retract | Saw) -> None:
        try:
            self._channel.send(message)
        except ChannelClosedError as error:
            self._reconnect(error)
            if not isinstance(message, Saw):
                self._channel.send(message)

    def _connect(self) -> Channel[FromStore]:
        sock = self._host.connect()
        sock.setblocking(False)
        channel: Channel[FromStore] = Channel(sock, FromStore)
        channel.send(self._hello)
        return channel

    def _reconnect(self, error: ChannelClosedError) -> None:
        logger.warning("The store has gone (%s); it is started again", error)
        self._channel.close()
        self._channel = self._connect()
        for message in self._own.values():
            self._channel.send(message)
