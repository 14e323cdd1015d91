"""What a job does: opens an adapter's files, checks them, and packs them where the store says."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_multilora.failures import FailureKind, classify_failure, describe_failure
from vllm_multilora.store.arena import OFFSET_MASK, PLACE_BITS
from vllm_multilora.store.channel import Channel, ChannelClosedError
from vllm_multilora.store.hub import fetched
from vllm_multilora.store.job_messages import (
    Checked,
    CheckOnly,
    Done,
    JobFailed,
    Known,
    Opened,
    Place,
    ToJob,
)
from vllm_multilora.store.messages import Contents, StoreSettings
from vllm_multilora.store.reader import Reader
from vllm_multilora.store.recent_failures import Failure


@dataclass(frozen=True)
class Task:
    """What one job is about.

    Attributes:
        number: Of the job.
        path: The adapter's folder.
        layouts: What its tensors must fit.
        settings: The rules, and the time that the job may take.
    """

    number: int
    path: str
    layouts: Sequence[Any]
    settings: StoreSettings


def run_job(
    sock: socket.socket, task: Task, reader: Reader, confine: Callable[[], None] = lambda: None
) -> None:
    """Does a task, over a blocking socket to the store; whatever goes wrong is said there.

    Args:
        sock: To the store.
        task: What to do.
        reader: Reads adapters.
        confine: Called before anything that a customer has written is looked at.
    """
    channel: Channel[ToJob] = Channel(sock, ToJob, take_descriptors=True)
    try:
        try:
            _read(channel, task, reader, confine)
        except ChannelClosedError:
            raise
        except Exception as error:
            channel.send(_failure(error))
    except ChannelClosedError:
        pass  # the store has lost interest
    finally:
        channel.close()


def _read(channel: Channel[ToJob], task: Task, reader: Reader, confine: Callable[[], None]) -> None:
    path = fetched(task.path, is_allowed=task.settings.allow_hub)
    rules = reader.rules(task.settings)
    confine()
    with reader.open(path, rules) as source:
        # Where a file is missing ("-"), two adapters of one version are not the same.
        version = "" if "-" in source.version.split() else source.version
        channel.send(Opened(version))
        answer, _ = _next(channel)
        if isinstance(answer, Known):
            return
        intake = source.check(task.layouts)
        blocks = np.ascontiguousarray(intake.block_bytes, np.int64)
        contents = Contents(
            rank=intake.rank,
            has_special=intake.has_special,
            left_out=tuple(intake.left_out),
            invocation_tokens=tuple(intake.invocation_tokens),
            dora=intake.dora,
        )
        channel.send(Checked(contents, blocks.tobytes()))
        answer, descriptors = _next(channel)
        if isinstance(answer, CheckOnly):
            taken = intake.read(None, None)
        elif isinstance(answer, Place):
            places = np.frombuffer(answer.places, np.int64)
            with _Mapping(answer.extents, descriptors) as mapping:
                taken = intake.read(mapping.addresses(places), places)
        else:
            raise RuntimeError(f"the store answered {answer!r}, expected Place or CheckOnly")
        channel.send(Done(taken.digest, taken.nbytes, taken.parts))


def _next(channel: Channel[ToJob]) -> tuple[ToJob, list[int]]:
    while not (received := channel.receive()):
        pass
    return received[0]


class _Mapping:
    """The extents of one pack, and nothing else, mapped to be written to."""

    def __init__(self, extents: Sequence[tuple[int, int, int]], descriptors: list[int]) -> None:
        self._extents = extents
        try:
            self._maps = [
                mmap.mmap(descriptors[segment], size, mmap.MAP_SHARED, offset=offset)
                for segment, offset, size in extents
            ]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def __enter__(self) -> _Mapping:
        return self

    def __exit__(self, *exception: object) -> None:
        for one in self._maps:
            one.close()

    def addresses(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where each place lies in this process."""
        segments = places >> PLACE_BITS
        offsets = places & OFFSET_MASK
        found = np.zeros(len(places), np.int64)
        for (segment, offset, size), one in zip(self._extents, self._maps, strict=True):
            begin = np.frombuffer(one, np.uint8).__array_interface__["data"][0]
            inside = (segments == segment) & (offsets >= offset) & (offsets < offset + size)
            found[inside] = offsets[inside] - offset + begin
        return found


def _failure(error: Exception) -> JobFailed:
    kind, message = classify_failure(error), describe_failure(error)
    if isinstance(error, MemoryError):
        message = f"reading and checking it takes more memory than a job may have: {message}"
    elif kind is FailureKind.INTERNAL:
        message = f"{type(error).__name__}: {message}"
    problems = [problem.as_dict() for problem in getattr(error, "problems", ())]
    bounded = Failure(kind, message, problems).bounded()
    return JobFailed(bounded.kind, bounded.message, bounded.problems)
