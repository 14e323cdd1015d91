"""How a worker accesses host memory: the store's segments, which it only reads.

They are mapped read-only, but for those that are registered with a device: on most machines CUDA
page-locks nothing that may not be written to.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vllm_multilora.store.memory.arena import OFFSET_MASK, PLACE_BITS
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol import store_folder
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError

_ANSWER_S = 10.0


class Device(Protocol):
    """What segments are registered with."""

    def add(self, number: int, address: int, size: int) -> None:
        """A segment was mapped: its number, where it lies in this process, its bytes."""

    def drop(self, number: int) -> None:
        """It is about to be unmapped."""


class _Mapped:
    """One mapping; its bytes stay as long as it does, whatever becomes of the store."""

    def __init__(self, descriptor: int, size: int, *, writable: bool) -> None:
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        self._map = mmap.mmap(descriptor, size, mmap.MAP_SHARED, access)
        self.address = int(np.frombuffer(self._map, np.uint8).__array_interface__["data"][0])

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._map)[offset : offset + nbytes].toreadonly()

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a view is left: it unmaps when it goes
            self._map.close()


class SegmentMapper:
    """Maps segments when they are first needed, and keeps them; for one thread but for `wait`.

    It connects at once, while the address leads to the store that the engine core has found:
    whoever cleans up may remove the socket, which the store does not need any more.

    One that registers segments with a device watches for new ones, and maps them ahead
    (`map_opened`): the store makes a segment before it begins to read what is to lie there.
    """

    def __init__(self, address: str, server: str, device: Device | None = None) -> None:
        self._path = address.removeprefix("unix:")
        self._hello = msg.Hello(msg.PROTOCOL, "worker", server, os.getpid())
        self._device = device
        self._segments: dict[int, _Mapped] = {}
        self._opened: set[int] = set()  # and not mapped yet
        self._closed: set[int] = set()
        self._channel: Channel[msg.FromStore] | None = None
        with contextlib.suppress(ChannelClosedError):  # else when a segment is first needed
            self._connected()

    def address(self, place: int, segments: Sequence[int]) -> int:
        """Where a place of a pack with these segments lies here; raises `StoreUnavailableError`."""
        return self._segment(segments[place >> PLACE_BITS]).address + (place & OFFSET_MASK)

    def view(self, place: int, nbytes: int, segments: Sequence[int]) -> memoryview:
        """The bytes at a place, mapped as long as this view is there. Raises as above."""
        return self._segment(segments[place >> PLACE_BITS]).view(place & OFFSET_MASK, nbytes)

    def wait(self, seconds: float) -> bool:
        """Waits until the store may have said something, or is not connected; from any thread."""
        channel = self._channel
        if channel is None:
            return True
        try:
            return channel.wait(seconds)
        except ValueError:  # it was closed meanwhile
            return True

    def map_opened(self) -> None:
        """Maps the segments that the store has made; to be called between copies.

        What it has closed is unmapped before: a device has no more registered than the budget.

        Raises:
            StoreUnavailableError: There is no store; the next call finds its successor.
        """
        self.drop_closed()
        try:
            self._connected()
        except ChannelClosedError as error:
            self._disconnect()
            raise StoreUnavailableError(str(error)) from error
        while self._opened:
            number = self._opened.pop()
            with contextlib.suppress(StoreUnavailableError):  # it was closed again
                self._segment(number)

    def drop_closed(self) -> None:
        """Unmaps what the store has closed, or left when it died; between copies: a system call."""
        if self._channel is not None:
            try:
                self._channel_wait(0)
            except ChannelClosedError:
                self._disconnect()
        for number in self._closed & self._segments.keys():
            self._unmap(number)
        self._closed.clear()

    def close(self) -> None:
        for number in list(self._segments):
            self._unmap(number)
        self._disconnect()

    def _segment(self, number: int) -> _Mapped:
        found = self._segments.get(number)
        return found if found is not None else self._map(number)

    def _map(self, number: int) -> _Mapped:
        try:
            answer, descriptors = self._ask(number)
        except ChannelClosedError:
            # The store may be a new one since; it says itself that it does not know the segment.
            self._disconnect()
            try:
                answer, descriptors = self._ask(number)
            except ChannelClosedError as error:
                raise StoreUnavailableError(f"segment {number}: {error}") from error
        if not answer.size:
            raise StoreUnavailableError(
                f"the store has no segment {number} (any more): it has been started again, or the "
                "pack was released too early"
            )
        try:
            mapped = _Mapped(descriptors[0], answer.size, writable=self._device is not None)
        finally:
            os.close(descriptors[0])
        self._segments[number] = mapped
        if self._device is not None:
            self._device.add(number, mapped.address, answer.size)
        return mapped

    def _unmap(self, number: int) -> None:
        segment = self._segments.pop(number)
        if self._device is not None:
            self._device.drop(number)
        segment.close()

    def _ask(self, number: int) -> tuple[msg.Segment, list[int]]:
        self._connected().send(msg.Map(number))
        while True:
            received = self._channel_wait(_ANSWER_S)
            if not received:
                raise ChannelClosedError(f"the store has not answered within {_ANSWER_S:g} seconds")
            for message, descriptors in received:
                if isinstance(message, msg.Segment) and message.number == number:
                    return message, descriptors
                if isinstance(message, msg.Refused):
                    raise StoreUnavailableError(f"the store refuses: {message.reason}")

    def _connected(self) -> Channel[msg.FromStore]:
        if self._channel is None:
            try:
                sock = store_folder.connect(self._path)
            except OSError as error:
                raise ChannelClosedError(f"{self._path}: {error}") from error
            self._channel = Channel(sock, msg.FromStore, take_descriptors=True)
            self._channel.send(self._hello)
            if self._device is not None:
                self._channel.send(msg.Watch())
        return self._channel

    def _channel_wait(self, seconds: float) -> list[tuple[msg.FromStore, list[int]]]:
        assert self._channel is not None
        received = self._channel.receive() if self._channel.wait(seconds) else []
        self._opened |= {m.number for m, _ in received if isinstance(m, msg.SegmentOpened)}
        self._closed |= {m.number for m, _ in received if isinstance(m, msg.SegmentClosed)}
        return received

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._opened.clear()
        # Nobody says any more when these are closed. A copy may still need some of them.
        self._closed |= self._segments.keys()
