"""What a job does: opens an adapter's files, checks them, and packs them where the store says."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from numpy.typing import NDArray

from vllm_multilora.failures import FailureKind, classify_failure, describe_failure
from vllm_multilora.sources.hub import fetched
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.memory.arena import PLACE_BITS
from vllm_multilora.store.memory.entries import Load
from vllm_multilora.store.memory.syscalls import mapped
from vllm_multilora.store.protocol import job_messages as msg
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import Contents


def run_job(
    sock: socket.socket,
    load: Load,
    reader: AdapterReader,
    confine: Callable[[], None] = lambda: None,
) -> None:
    """Does a load's work, over a blocking socket to the store; whatever goes wrong is said there.

    `confine` is called before anything that a customer has written is looked at.
    """
    channel: Channel[msg.ToJob] = Channel(sock, msg.ToJob, take_descriptors=True)
    try:
        try:
            _read(channel, load, reader, confine)
        except ChannelClosedError:
            raise
        except Exception as error:
            channel.send(_failure(error))
    except ChannelClosedError:
        pass  # the store has lost interest
    finally:
        channel.close()


def _read(
    channel: Channel[msg.ToJob], load: Load, reader: AdapterReader, confine: Callable[[], None]
) -> None:
    path = fetched(load.path, is_allowed=load.settings.allow_hub)
    rules = reader.rules(load.settings)
    confine()
    with reader.open(path, rules) as source:
        # Where a file is missing ("-"), two adapters of one version are not the same.
        version = "" if "-" in source.version.split() else source.version
        channel.send(msg.Opened(version))  # the store ends the job where these files are known
        intake = source.check(load.layouts)
        blocks = np.ascontiguousarray(intake.block_bytes, np.int64)
        contents = Contents(
            rank=intake.rank,
            has_special=intake.has_special,
            invocation_tokens=tuple(intake.invocation_tokens),
            dora=intake.dora,
        )
        channel.send(msg.Checked(contents, blocks.tobytes()))
        while not (received := channel.receive()):
            pass
        answer, descriptors = received[0]
        if isinstance(answer, msg.CheckOnly):
            taken = intake.read(None, None)
        elif isinstance(answer, msg.Place):
            with _mapped(answer, descriptors) as addresses:
                taken = intake.read(addresses, np.frombuffer(answer.places, np.int64))
        else:
            raise RuntimeError(f"the store answered {answer!r}, expected Place or CheckOnly")
        channel.send(msg.Done(taken.digest, taken.nbytes, taken.parts))


@contextmanager
def _mapped(place: msg.Place, descriptors: list[int]) -> Iterator[NDArray[np.int64]]:
    """Where each block lies in this process; only the pack's extents are mapped."""
    places = np.frombuffer(place.places, np.int64)
    extents = sorted(place.extents)
    with ExitStack() as mappings:
        try:
            begins = [
                mappings.enter_context(mapped(descriptors[segment], offset, size))
                for segment, offset, size in extents
            ]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        firsts = np.array([(segment << PLACE_BITS) | offset for segment, offset, _ in extents])
        nearest = np.searchsorted(firsts, places, side="right") - 1
        yield np.array(begins)[nearest] + (places - firsts[nearest])


def _failure(error: Exception) -> msg.Failure:
    kind, message = classify_failure(error), describe_failure(error)
    if isinstance(error, MemoryError):
        message = f"reading and checking it takes more memory than a job may have: {message}"
    elif kind is FailureKind.INTERNAL:
        message = f"{type(error).__name__}: {message}"
    problems = [problem.as_dict() for problem in getattr(error, "problems", ())]
    return msg.Failure(kind, message, problems)
