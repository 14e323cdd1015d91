"""How an API server shares its adapters' names with the others of its server."""

from __future__ import annotations

import itertools
import logging
import os
from typing import TypeAlias

import msgspec

from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.store_launch import FIRST_PAUSE_S, LONGEST_PAUSE_S, StoreHost

logger = logging.getLogger(__name__)

Heard: TypeAlias = msg.Published | msg.Retracted | msg.Settled


class NamesClient:
    """A connection for names only; nothing waits for the store.

    A store that has died is started again by `poll`, and told what this client has published and
    retracted that the others may not know.

    Raises:
        StoreUnavailableError: There is no store, and none can be started.
    """

    def __init__(self, host: StoreHost, server: str, peers: int = 1) -> None:
        self._host = host
        self._peers = peers
        self._hello = msg.Hello(msg.PROTOCOL, "server", server, os.getpid())
        self._requests = itertools.count(1)
        # What the next store is to be told: names that hold, as far as this one has said; and what
        # it has not passed on yet, or, of retractions, what others may not have heard.
        self._own: dict[str, msg.Publish] = {}
        self._unsettled: dict[int, msg.Publish | msg.Retract] = {}
        self._channel: Channel[msg.FromStore] | None = None
        self.pause_s = FIRST_PAUSE_S
        """Seconds after which to call `poll` where there is no store."""
        self._connect()

    def fileno(self) -> int:
        """The socket, for event loops; -1 while there is no store. `poll` may bring another one."""
        return -1 if self._channel is None else self._channel.fileno()

    def publish(self, name: str, adapter: int, path: str, details: dict[str, str | bool]) -> int:
        """Says where a name leads, by a new adapter's number; returns what `Settled` names."""
        return self._change(msg.Publish(next(self._requests), name, adapter, path, details))

    def retract(self, name: str, adapter: int) -> int:
        """Says where a name does not lead any more; returns the number that `Settled` names."""
        return self._change(msg.Retract(next(self._requests), name, adapter))

    def saw(self, serial: int) -> None:
        self._send(msg.Saw(serial))

    def poll(self) -> list[Heard]:
        """What has come since the last call: all changes, this client's too, in the store's order.

        Never raises: where there is no store, it is to be called again after `pause_s`.
        """
        if self._channel is None:
            try:
                self._connect()
            except StoreUnavailableError as error:
                logger.error("No store: %s; trying again in %.1f seconds", error, self.pause_s)
        if self._channel is None:
            return []
        try:
            self._channel.flush()
            received = [message for message, _ in self._channel.receive()]
        except ChannelClosedError as error:
            self._lose(error)
            return []
        for message in received:
            self._hear(message)
        return [message for message in received if isinstance(message, Heard)]

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _change(self, message: msg.Publish | msg.Retract) -> int:
        self._unsettled[message.request] = message
        self._send(message)
        return message.request

    def _hear(self, message: msg.FromStore) -> None:
        if isinstance(message, msg.Refused):
            logger.error("The store refuses to serve: %s", message.reason)
            return
        self.pause_s = FIRST_PAUSE_S
        match message:
            case msg.Settled(request):
                self._unsettled.pop(request, None)
            case msg.Retracted(_, name, adapter):
                if (own := self._own.get(name)) is not None and own.adapter == adapter:
                    del self._own[name]
            case msg.Published(_, name, adapter):
                for said in (self._own.pop(name, None), *self._unsettled.values()):
                    if isinstance(said, msg.Publish) and said.adapter == adapter:
                        self._own[name] = said
                        self._unsettled.pop(said.request, None)

    def _send(self, message: msg.Hello | msg.Publish | msg.Retract | msg.Saw) -> None:
        if self._channel is None:
            return  # `_connect` sends again all that still matters to a new store
        try:
            self._channel.send(message)
        except ChannelClosedError as error:
            self._lose(error)

    def _connect(self) -> None:
        self.pause_s = min(2 * self.pause_s, LONGEST_PAUSE_S)  # until it has said something
        sock = self._host.connect()
        sock.setblocking(False)
        self._channel = Channel(sock, msg.FromStore)
        self._send(self._hello)
        self._hello = msgspec.structs.replace(self._hello, peers=self._peers)  # to the next store
        for own in self._own.values():
            self._send(msgspec.structs.replace(own, again=True))
        for change in self._unsettled.values():
            self._send(change)

    def _lose(self, error: ChannelClosedError) -> None:
        logger.warning("The store has gone (%s); it is started again", error)
        self.close()
