"""The link on which workers report to their engine core what became of its orders.

Orders go to the workers in vLLM's own calls, in step with the batches; answers come whenever copies
are finished. Each worker of this machine connects to a socket of the engine core while the engine
starts, and each worker of another machine over TCP (`remote_link`). Workers are never asked: what
they report arrives in order, and once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.attached import Attached
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.store_folder import listen_alone, own_path, store_folder
from vllm_multilora.store.protocol.waking import Waker

logger = logging.getLogger(__name__)

LINK: Attached[FillLink | None] = Attached("link")
"""An executor's link, on which its workers answer; None where they cannot."""

PATH_VARIABLE = "MULTILORA_FILL_LINK"
"""Tells workers where the socket is; set by the engine core while it starts them."""

_ATTACH_LIMIT_S = 10.0


class Attach(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A worker's first word: which one it is."""

    rank: int


class Filled(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An order was carried out."""

    order: int
    seconds: float | None  # None where there was nothing to do


class FillFailed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An order cannot be carried out.

    Attributes:
        order: Its number.
        kind: What kind of thing went wrong.
        message: What was found, for the tenant whose requests fail.
        is_gone: Whether the adapter's memory is gone, so that it is to be loaded again.
    """

    order: int
    kind: FailureKind
    message: str
    is_gone: bool = False


class Missing(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A step came with an adapter that no slot of this worker has; it ran without it."""

    adapter_id: int


Answer: TypeAlias = Filled | FillFailed | Missing
_Incoming: TypeAlias = Attach | Filled | FillFailed | Missing


class FillLink:
    """The engine core's end; for its main thread only.

    Raises:
        OSError: No socket can be made in the folder of this user's stores.
        StoreUnavailableError: Likewise.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self.path = own_path(store_folder(), "w")
        self._listener = listen_alone(self.path)
        self._channels: dict[int, Channel[_Incoming]] = {}
        self._selector = selectors.EpollSelector()
        self._waker: Waker | None = None

    def attach_all(self) -> list[int]:
        """Takes in the workers that have connected, and nobody after that; returns who has not."""
        self._listener.setblocking(False)
        while len(self._channels) < self._ranks:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                break
            self._attach(connection)
        self._remove_socket()
        return sorted(set(range(self._ranks)) - self._channels.keys())

    def _attach(self, connection: socket.socket) -> None:
        connection.settimeout(_ATTACH_LIMIT_S)
        channel: Channel[_Incoming] = Channel(connection, _Incoming)
        try:
            messages = channel.receive()
        except ChannelClosedError:
            messages = []
        if not messages or not isinstance(attach := messages[0][0], Attach):
            channel.close()
            return
        if not 0 <= attach.rank < self._ranks or attach.rank in self._channels:
            logger.error(
                "A worker connected as rank %d of %d, %s; it is not heard.",
                attach.rank,
                self._ranks,
                "which has connected already" if attach.rank in self._channels else "which is none",
            )
            channel.close()
            return
        self.adopt(attach.rank, connection, channel)

    def adopt(
        self, rank: int, connection: socket.socket, channel: Channel[_Incoming] | None = None
    ) -> None:
        """Takes in a worker of which it is known which one it is, such as on another machine."""
        channel = channel or Channel(connection, _Incoming)
        connection.setblocking(False)
        self._channels[rank] = channel
        self._selector.register(connection, selectors.EVENT_READ, (rank, channel))

    def poll(self, seconds: float = 0.0) -> list[tuple[int, Answer]]:
        """What workers have said since the last call, each with its rank."""
        if self._waker is not None:
            self._waker.rearm()
        found: list[tuple[int, Answer]] = []
        for key, _ in self._selector.select(seconds):
            rank, channel = key.data
            try:
                messages = channel.receive()
            except ChannelClosedError:
                # vLLM notices by itself when a worker ends, and ends the engine.
                self._selector.unregister(key.fileobj)
                continue
            found += ((rank, m) for m, _ in messages if not isinstance(m, Attach))
        return found

    def start_waking(self, wake: Callable[[], None]) -> None:
        """Calls `wake` on a thread of its own when something comes, once until the next `poll`."""
        self._waker = Waker(wake)
        self._waker.watch(self._selector.fileno())

    def close(self) -> None:
        """Ends the link; may be called again."""
        if self._waker is not None:
            self._waker.close()
            self._waker = None
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._selector.close()
        self._remove_socket()

    def _remove_socket(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        self._listener.close()


class WorkerLink:
    """A worker's end; may be used by several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._channel: Channel[_Incoming] = Channel(connection, _Incoming)
        self._lock = threading.Lock()

    @classmethod
    def attach(cls, path: Path, rank: int) -> WorkerLink:
        """Connects to the engine core's `FillLink.path`, as a worker.

        Raises:
            OSError: There is no such socket: the engine core is on another machine.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            raise
        link = cls(connection)
        link._send(Attach(rank))
        return link

    def tell(self, answer: Answer) -> None:
        """Says something to the engine core; it is there when this returns."""
        try:
            self._send(answer)
        except ChannelClosedError as error:
            logger.warning("The engine core does not hear this worker: %s", error)

    def _send(self, message: _Incoming) -> None:
        with self._lock:
            self._channel.send(message)


def attach_worker(rank: int) -> WorkerLink | None:
    """This worker's end of its engine core's link; None where it has none within reach."""
    path = os.environ.get(PATH_VARIABLE)
    if not path:
        return None
    try:
        return WorkerLink.attach(Path(path), rank)
    except OSError as error:
        logger.info("This worker does not reach its engine core's socket %s: %s", path, error)
        return None
