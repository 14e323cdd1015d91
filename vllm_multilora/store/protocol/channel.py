"""Messages over a stream socket: framed, without ever waiting for a slow reader."""

from __future__ import annotations

import contextlib
import functools
import os
import select
import selectors
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from vllm_multilora.errors import MultiLoRAError

Incoming = TypeVar("Incoming")

LARGEST_MESSAGE = 64 << 20
"""Bytes of the largest message that is taken: the layouts of a large model are some MiB."""

MAX_PENDING = 16 << 20
"""Bytes that may wait for a reader, beside one message, before it is given up."""

MAX_DESCRIPTORS = 250
"""Descriptors of one message; Linux carries 253."""

_FRAME = struct.Struct("<IB")
_READ_BYTES = 64 << 10  # for more, each read would get memory from the system and give it back


@functools.cache
def _decoder(incoming: Any) -> msgspec.msgpack.Decoder[Any]:
    """Reads one type of messages; making it takes longer than a job's messages do."""
    return msgspec.msgpack.Decoder(incoming)


class ChannelClosedError(MultiLoRAError, ConnectionError):
    """The other side has gone, or this side has given it up; the message says which."""


class Channel(Generic[Incoming]):
    """One end of a connection: sends any messages, receives those of one type.

    A frame is the message's length (uint32), the number of descriptors that come with its first
    byte (uint8), and the message in msgpack. On a socket that does not block, nothing here does:
    what the other side does not read yet waits in memory. On one that blocks, both directions do.

    Args:
        sock: A connected AF_UNIX or TCP stream socket; the channel owns it.
        incoming: The type (a union of tagged structs) of what is received.
        take_descriptors: Whether descriptors are accepted. Where they are not, the kernel drops
            them.
    """

    def __init__(
        self,
        sock: socket.socket,
        incoming: Any,
        *,
        take_descriptors: bool = False,
    ) -> None:
        self._socket = sock
        self._decode: Callable[[bytes], Incoming] = _decoder(incoming).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._take_descriptors = take_descriptors
        self._outgoing: deque[tuple[memoryview, list[int]]] = deque()
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self.pending = 0
        """Bytes that wait to be sent; `flush` is due when the socket can be written to."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Sends a message, or keeps it for `flush`.

        Args:
            message: What to say.
            descriptors: At most `MAX_DESCRIPTORS`, sent along as copies; the caller keeps its own.

        Raises:
            ChannelClosedError: The other side has gone, or has not read for too long.
            OSError: This process is at its limit of open files; nothing of the message is sent.
        """
        data = self._encode(message)
        if self.pending > MAX_PENDING:
            raise ChannelClosedError(
                f"the other side does not read: {self.pending} bytes wait to be sent, at most "
                f"{MAX_PENDING} may"
            )
        frame = memoryview(_FRAME.pack(len(data), len(descriptors)) + data)
        copies: list[int] = []
        try:
            for number in descriptors:
                copies.append(os.dup(number))
        except OSError:
            _close_all(copies)
            raise
        self._outgoing.append((frame, copies))
        self.pending += len(frame)
        if len(self._outgoing) == 1:
            self.flush()

    def flush(self) -> None:
        """Sends what the socket takes of what waits; raises like `send`."""
        while self._outgoing:
            frame, descriptors = self._outgoing[0]
            carried = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))]
            try:
                sent = self._socket.sendmsg([frame], carried if descriptors else [])
            except BlockingIOError:
                return
            except OSError as error:
                raise ChannelClosedError(f"the other side has gone: {error}") from error
            _close_all(descriptors)
            self.pending -= sent
            if sent < len(frame):
                self._outgoing[0] = (frame[sent:], [])
            else:
                self._outgoing.popleft()

    def wait(self, seconds: float) -> bool:
        """Waits at most so long to read or, while anything is pending, to send; whether it can."""
        poller = select.poll()
        poller.register(self, select.POLLIN | (select.POLLOUT if self.pending else 0))
        return bool(poller.poll(seconds * 1000))

    def wait_in(self, selector: selectors.BaseSelector) -> None:
        """Has a selector that watches this channel wake where something can be done.

        That is to read, and while anything is pending, to send it.
        """
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.pending else 0)
        data = selector.get_key(self).data
        selector.modify(self, events, data)  # free where they are the same

    def receive(self) -> list[tuple[Incoming, list[int]]]:
        """One read's whole messages, and descriptors, the caller's now; or `ChannelClosedError`."""
        try:
            data = self._read()
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosedError(f"the other side has gone: {error}") from error
        if not data:
            raise ChannelClosedError("the other side has closed the connection")
        self._incoming += data
        return list(self._whole_messages())

    def close(self) -> None:
        """Closes the socket and all descriptors that nobody has taken."""
        for _, descriptors in self._outgoing:
            _close_all(descriptors)
        _close_all(self._descriptors)
        self._outgoing.clear()
        self.pending = 0
        self._socket.close()

    def _read(self) -> bytes:
        if not self._take_descriptors:
            return self._socket.recv(_READ_BYTES)
        room = socket.CMSG_SPACE(MAX_DESCRIPTORS * array("i").itemsize)
        data, ancillary, _, _ = self._socket.recvmsg(_READ_BYTES, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array("i")
                numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
                self._descriptors.extend(numbers)
        return data

    def _whole_messages(self) -> Any:
        place = 0
        while len(self._incoming) - place >= _FRAME.size:
            length, count = _FRAME.unpack_from(self._incoming, place)
            if length > LARGEST_MESSAGE:
                raise ChannelClosedError(
                    f"a message of {length} bytes, at most {LARGEST_MESSAGE} are taken"
                )
            end = place + _FRAME.size + length
            if len(self._incoming) < end:
                break
            body = bytes(memoryview(self._incoming)[place + _FRAME.size : end])
            place = end
            if count and self._take_descriptors and len(self._descriptors) < count:
                raise ChannelClosedError(
                    f"{count} descriptors were announced, {len(self._descriptors)} came: this "
                    "process may be at its limit of open files (ulimit -n)"
                )
            taken = [self._descriptors.popleft() for _ in range(count) if self._take_descriptors]
            try:
                message = self._decode(body)
            except (msgspec.DecodeError, RecursionError) as error:
                _close_all(taken)
                raise ChannelClosedError(f"a message that makes no sense: {error}") from error
            yield message, taken
        del self._incoming[:place]


def _close_all(descriptors: Any) -> None:
    while descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptors.pop())
