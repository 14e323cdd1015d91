"""Stores that know nothing but names, and work when they are told to."""

import socket
from itertools import count
from pathlib import Path

from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import FromClient, Hello, Publish, Retract, Saw
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.shared_registrations import PublishedNames

NOW = 1000.0


class Stores:
    """One store after another; a host for clients."""

    path = Path("/nowhere")

    def __init__(self) -> None:
        self.is_down = False
        self.attempts = 0
        self._clients = count()
        self._channels: dict[int, Channel] = {}
        self._names = PublishedNames(self)

    def connect(self) -> socket.socket:
        self.attempts += 1
        if self.is_down:
            raise StoreUnavailableError("no process can be started")
        here, there = socket.socketpair()
        there.setblocking(False)
        self._channels[next(self._clients)] = Channel(there, FromClient)
        return here

    def send(self, client: int, message) -> None:
        self._channels[client].send(message)

    def work(self) -> None:
        """Does what clients say."""
        for client, channel in list(self._channels.items()):
            try:
                channel.flush()
                said = [message for message, _ in channel.receive()]
            except ChannelClosedError:
                del self._channels[client]
                self._names.leave(client)
                continue
            for message in said:
                match message:
                    case Hello():
                        self._names.join(client, message.server, message.pid, message.peers)
                    case Publish():
                        self._names.publish(client, message, NOW)
                    case Retract():
                        self._names.retract(client, message, NOW)
                    case Saw(serial):
                        self._names.saw(client, serial)

    def said(self) -> list:
        """What clients have said meanwhile, which is not done."""
        return [m for channel in self._channels.values() for m, _ in channel.receive()]

    def die(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._names = PublishedNames(self)
