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
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import (
    PROTOCOL,
    Cancel,
    Configure,
    Configured,
    Describe,
    Forget,
    FromClient,
    Hello,
    LoadRequest,
    Map,
    Publish,
    Refused,
    Release,
    Retract,
    Saw,
    Segment,
    Share,
    Totals,
    Used,
    Watch,
)
from vllm_multilora.store.protocol.store_folder import StoreAddress
from vllm_multilora.store.shared_registrations import PublishedNames

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Connection:
    """One client's connection.

    Attributes:
        number: Of the client.
        channel: To the client.
        segments: Those that it has mapped, or been told of: it is told when they are closed.
        watches: Whether it registers segments with a device, and so is told of all.
        totals: What it was told of host memory last.
    """

    number: int
    channel: Channel[FromClient]
    segments: set[int] = field(default_factory=set)
    watches: bool = False
    totals: Totals | None = None


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

    def hear(self, connection: Connection, message: FromClient) -> bool:
        """Does what a client says.

        Returns:
            Whether it asks for a description, which is not this object's to give.

        Raises:
            RefusedError: The client is not served.
            ChannelClosedError: It has gone.
        """
        registry, number, now = self._registry, connection.number, time.monotonic()
        if number not in registry.clients:
            self._greet(connection, message)
            return False
        match message:
            case Configure():
                self._configure(connection, message, now)
            case LoadRequest():
                registry.request_load(number, message, now)
            case Share(ticket, owner):
                registry.share(number, ticket, owner)
            case Cancel(ticket):
                registry.cancel(number, ticket, now)
            case Release(pack):
                registry.release(number, pack, now)
            case Used(packs):
                registry.used(number, packs)
            case Forget(adapter):
                registry.forget(number, adapter, now)
            case Map():
                self._hand_out(connection, message)
            case Watch():
                connection.watches = True
            case Publish():
                self._names.publish(number, message, now)
            case Retract():
                self._names.retract(number, message, now)
            case Saw(serial):
                self._names.saw(number, serial)
            case Describe():
                return True
            case Hello():
                raise RefusedError("Hello was said twice")
        return False

    def _greet(self, connection: Connection, message: FromClient) -> None:
        if not isinstance(message, Hello):
            raise RefusedError(f"the first message is {type(message).__name__}, expected Hello")
        if message.protocol != PROTOCOL:
            raise RefusedError(
                f"this store (process {os.getpid()}) speaks protocol {PROTOCOL}, the client speaks "
                f"{message.protocol}: vllm-multilora has been replaced by another version since "
                "the client began; restart the client's server"
            )
        self._registry.clients[connection.number] = Client(
            connection.number, message.role, message.server, message.pid
        )
        if message.role == "server":
            self._names.join(connection.number, message.server, message.pid, message.peers)

    def _configure(self, connection: Connection, message: Configure, now: float) -> None:
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
        connection.channel.send(Configured(notes))

    def _hand_out(self, connection: Connection, message: Map) -> None:
        number = message.segment
        size = self._segments.size(number)
        if not size:
            connection.channel.send(Segment(number, 0))
            return
        descriptor = self._segments.open(number, pinned=connection.watches)
        try:
            connection.channel.send(Segment(number, size), [descriptor])
        finally:
            os.close(descriptor)
        connection.segments.add(number)


class Acceptor:
    """Takes in clients: only processes of this user, and only while there are descriptors.

    Args:
        listener: A listening socket; owned by the door.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._address = StoreAddress.of(listener)
        listener.setblocking(False)
        # Where this process is at its limit of descriptors, this one is given up to say so.
        self._reserve = socket.socket(socket.AF_UNIX)

    def fileno(self) -> int:
        """For selectors."""
        return self._listener.fileno()

    def accept(self) -> Channel[FromClient] | None:
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
        return Channel(sock, FromClient)

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
            channel: Channel[FromClient] = Channel(sock, FromClient)
            with contextlib.closing(channel):
                channel.send(Refused(reason))
        with contextlib.suppress(OSError):
            self._reserve = socket.socket(socket.AF_UNIX)


def _is_same_user(sock: socket.socket) -> bool:
    """Whether the process at the other end of a local socket belongs to this process's user."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", data)
    return user in (os.geteuid(), 0)
