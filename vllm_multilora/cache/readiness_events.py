"""What a rank says of its adapters, and how it is written into an entry of the log.

An entry, little-endian: sequence number (uint64), CRC-32 (uint32) of all else, message length
(uint16), event (uint8), kind of failure (uint8), adapter (int64), serial number (uint64), message
(UTF-8, as many bytes as its length says).
"""

from __future__ import annotations

import enum
import struct
import zlib
from dataclasses import dataclass

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure

ENTRY_BYTES = 384
"""Bytes of an entry's place; a multiple of a cache line, so that entries share none."""


@dataclass(frozen=True)
class Ready:
    """The rank has the adapter in host memory.

    Attributes:
        adapter_id: The adapter.
        serial: The number of the request to load it that this answers.
    """

    adapter_id: int
    serial: int


@dataclass(frozen=True)
class Failed:
    """The rank could not load the adapter.

    Attributes:
        adapter_id: The adapter.
        serial: The number of the request to load it that this answers.
        failure: Why; its message comes out cut to `MESSAGE_BYTES`.
    """

    adapter_id: int
    serial: int
    failure: LoadFailure


@dataclass(frozen=True)
class Lost:
    """The rank had the adapter in host memory and has it no more.

    Attributes:
        adapter_id: The adapter.
    """

    adapter_id: int


@dataclass(frozen=True)
class Placed:
    """The rank has done what it can to have the adapter in a slot before a step needs it.

    Attributes:
        adapter_id: The adapter.
        serial: The number of the request to place it that this answers.
    """

    adapter_id: int
    serial: int


@dataclass(frozen=True)
class Displaced:
    """The adapter has left its slot on the rank.

    Attributes:
        adapter_id: The adapter.
    """

    adapter_id: int


class MissedReason(enum.Enum):
    """Why events of a rank did not arrive.

    Attributes:
        OVERFLOW: The rank wrote more than the log holds before the reader came.
        CORRUPT: An entry is not what was written, or its writer died while writing.
    """

    OVERFLOW = "overflow"
    CORRUPT = "corrupt"


@dataclass(frozen=True)
class Missed:
    """Not an event but a gap: what the rank said in between is not known.

    Attributes:
        reason: How it came about.
    """

    reason: MissedReason


Event = Ready | Failed | Lost | Placed | Displaced

_SEQUENCE = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_FACTS = struct.Struct("<HBBqQ")
_MESSAGE_AT = _SEQUENCE.size + _CHECKSUM.size + _FACTS.size
MESSAGE_BYTES = ENTRY_BYTES - _MESSAGE_AT
"""Most bytes of a failure's message."""

_READY, _FAILED, _LOST, _PLACED, _DISPLACED = 1, 2, 3, 4, 5
# The numbers on the wire; all ranks run the same code, so their order may change.
_KINDS = tuple(FailureKind)


def encode(event: Event, sequence: int) -> bytes:
    """An entry, as long as it needs to be.

    Raises:
        ValueError: An adapter's id is no int64 or a serial number no uint64.
    """
    serial, kind, message = 0, 0, b""
    if isinstance(event, Lost):
        number = _LOST
    elif isinstance(event, Displaced):
        number = _DISPLACED
    else:
        number = _PLACED if isinstance(event, Placed) else _READY
        serial = event.serial
        if isinstance(event, Failed):
            number, kind = _FAILED, _KINDS.index(event.failure.kind)
            message = cut_utf8(event.failure.message, MESSAGE_BYTES)
    try:
        facts = _FACTS.pack(len(message), number, kind, event.adapter_id, serial) + message
    except struct.error as error:
        raise ValueError(
            f"{event} cannot be logged: adapter ids must be int64 and serial numbers uint64 "
            f"({error})"
        ) from error
    head = _SEQUENCE.pack(sequence)
    return head + _CHECKSUM.pack(_checksum(head, facts)) + facts


def sequence_of(entry: bytes) -> int:
    """An entry's sequence number, which is to be believed only if `decode` is successful."""
    return int(_SEQUENCE.unpack_from(entry)[0])


def decode(entry: bytes) -> Event | None:
    """The event in an entry's place of `ENTRY_BYTES` bytes; None: it is torn, corrupt or empty."""
    length, number, kind, adapter_id, serial = _FACTS.unpack_from(
        entry, _SEQUENCE.size + _CHECKSUM.size
    )
    end = _MESSAGE_AT + length
    if end > len(entry):
        return None
    (checksum,) = _CHECKSUM.unpack_from(entry, _SEQUENCE.size)
    facts = entry[_SEQUENCE.size + _CHECKSUM.size : end]
    if checksum != _checksum(entry[: _SEQUENCE.size], facts):
        return None
    if number == _READY:
        return Ready(adapter_id, serial)
    if number == _LOST:
        return Lost(adapter_id)
    if number == _PLACED:
        return Placed(adapter_id, serial)
    if number == _DISPLACED:
        return Displaced(adapter_id)
    if number == _FAILED and kind < len(_KINDS):
        message = entry[_MESSAGE_AT:end].decode("utf-8", "replace")
        return Failed(adapter_id, serial, LoadFailure(_KINDS[kind], message))
    return None


def cut_utf8(text: str, limit: int) -> bytes:
    """Text as at most `limit` bytes of UTF-8, cut between characters and then ending in `…`.

    What UTF-8 cannot express (a lone surrogate, as undecodable file names have) becomes `?`.
    """
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data
    mark = "…".encode()
    whole = data[: limit - len(mark)].decode("utf-8", "ignore")
    return whole.encode() + mark


def _checksum(head: bytes, facts: bytes) -> int:
    return zlib.crc32(facts, zlib.crc32(head))
