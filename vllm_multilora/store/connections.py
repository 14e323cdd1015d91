"""The store's connections: passes what clients say on to the registry."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import socket
import struct
import time
from dataclasses import dataclass, field

import msgspec

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.policies.contained_policy import ContainedPolicy
from vllm_multilora.slots.policies.policy import PolicyError
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.loads.registry import Registry
from vllm_multilora.store.memory.entries import Client
from vllm_multilora.store.memory.segments import SharedSegments
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.store_folder import StoreAddress
from vllm_multilora.store.shared_registrations import PublishedNames

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Connection:
    """One client's connection, and what it was told: of `segments` it knows, and `totals`.

    One that `watches` registers segments with a device, and so is told of all.
    """

    number: int
    channel: Channel[msg.FromClient]
    segments: set[int] = field(default_factory=set)
    watches: bool = False
    totals: msg.Totals | None = None


class RefusedError(Exception):
    """The client is not to be served; the message is for it."""


class Conversation:
    """Understands clients."""

    def __init__(
        self,
        registry: Registry,
        segments: SharedSegments,
        reader: AdapterReader,
        names: PublishedNames,
    ) -> None:
        self._registry = registry
        self._names = names
        self._segments = segments
        self._reader = reader
        self._policy: str | None = None

    def hear(self, connection: Connection, message: msg.FromClient) -> bool:
        """Does what a client says; whether it asks for a description, which the server gives.

        Raises:
            RefusedError: The client is not served.
            ChannelClosedError: It has gone.
        """
        registry, number, now = self._registry, connection.number, time.monotonic()
        if number not in registry.clients:
            self._greet(connection, message)
            return False
        match message:
            case msg.Configure():
                self._configure(connection, message, now)
            case msg.LoadRequest():
                registry.request_load(number, message, now)
            case msg.Share(ticket, owner):
                registry.share(number, ticket, owner)
            case msg.Cancel(ticket):
                registry.cancel(number, ticket, now)
            case msg.Release(pack):
                registry.release(number, pack, now)
            case msg.Used(packs):
                registry.used(number, packs)
            case msg.Forget(adapter):
                registry.forget(number, adapter, now)
            case msg.Map():
                self._hand_out(connection, message)
            case msg.Watch():
                connection.watches = True
            case msg.Publish():
                self._names.publish(number, message, now)
            case msg.Retract():
                self._names.retract(number, message, now)
            case msg.Saw(serial):
                self._names.saw(number, serial)
            case msg.Describe():
                return True
            case msg.Hello():
                raise RefusedError("Hello was said twice")
        return False

    def _greet(self, connection: Connection, message: msg.FromClient) -> None:
        if not isinstance(message, msg.Hello):
            raise RefusedError(f"the first message is {type(message).__name__}, expected Hello")
        if message.protocol != msg.PROTOCOL:
            raise RefusedError(
                f"this store (process {os.getpid()}) speaks protocol {msg.PROTOCOL}, the client "
                f"speaks {message.protocol}: vllm-multilora has been replaced by another version "
                "since the client began; restart the client's server"
            )
        self._registry.clients[connection.number] = Client(
            connection.number, message.role, message.server, message.pid
        )
        if message.role == "server":
            self._names.join(connection.number, message.server, message.pid, message.peers)

    def _configure(self, connection: Connection, message: msg.Configure, now: float) -> None:
        settings = message.settings
        try:
            layouts = self._reader.decode_layouts(message.layouts)
            self._reader.prepare(settings)
            CpuBudget(settings.budget_adapters, settings.budget_bytes)
            policy = None
            if self._policy is None:
                policy = ContainedPolicy(make_policy(settings.policy))
        except msgspec.MsgspecError as error:
            raise RefusedError(f"the layouts cannot be understood: {error}") from error
        except (PolicyError, ConfigError) as error:
            raise RefusedError(str(error)) from error
        notes = []
        if policy is not None:
            self._policy = settings.policy
            self._registry.memory.policy = policy
        elif self._policy != settings.policy:
            notes.append(
                f"the cache policy of host memory is {self._policy!r}, as the first engine of this "
                f"store has set it, and not {settings.policy!r}"
            )
        model = hashlib.sha256(message.layouts).hexdigest()
        self._registry.configure(connection.number, model, layouts, settings, now)
        connection.channel.send(msg.Configured(notes))

    def _hand_out(self, connection: Connection, message: msg.Map) -> None:
        number = message.segment
        size = self._segments.size(number)
        if not size:
            connection.channel.send(msg.Segment(number, 0))
            return
        descriptor = self._segments.open(number, pinned=connection.watches)
        try:
            connection.channel.send(msg.Segment(number, size), [descriptor])
        finally:
            os.close(descriptor)
        connection.segments.add(number)


class Acceptor:
    """Takes in clients: only processes of this user, and only while there are descriptors."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._address = StoreAddress.of(listener)
        listener.setblocking(False)
        # Where this process is at its limit of descriptors, this one is given up to say so.
        self._reserve = socket.socket(socket.AF_UNIX)

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> Channel[msg.FromClient] | None:
        """A client that has come; None if that was nobody to be served."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse_for_descriptors()
            return None
        if not _is_same_user(sock):
            sock.close()
            return None
        sock.setblocking(False)
        return Channel(sock, msg.FromClient)

    def close(self) -> None:
        """Nobody comes in any more; the next store can have the place."""
        self._address.close()
        self._listener.close()
        self._reserve.close()

    def _refuse_for_descriptors(self) -> None:
        """Takes one connection by the descriptor kept for this, to say why it is not served."""
        self._reserve.close()
        reason = "the store has no descriptor left; raise its limit of open files (ulimit -n)"
        logger.error(reason)
        with contextlib.suppress(OSError, ChannelClosedError):
            sock, _ = self._listener.accept()
            channel: Channel[msg.FromClient] = Channel(sock, msg.FromClient)
            with contextlib.closing(channel):
                channel.send(msg.Refused(reason))
        with contextlib.suppress(OSError):
            self._reserve = socket.socket(socket.AF_UNIX)


def _is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a local socket belongs to this process's user."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", data)
    return user in (os.geteuid(), 0)
