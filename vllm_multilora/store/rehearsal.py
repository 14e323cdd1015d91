"""Does a job's work in the store itself, so that jobs inherit code that Python has adapted to it.

A process is forked for each job. Python specializes code while it runs, and fills caches. A job
that has to do so itself copies the pages that it changes, and takes more processor time.
"""

from __future__ import annotations

import contextlib
import socket
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from vllm_multilora.adapters.sample import write_sample
from vllm_multilora.store.adapter_reader import AdapterReader
from vllm_multilora.store.arena import PAGE
from vllm_multilora.store.channel import Channel
from vllm_multilora.store.entries import Binding, Load, Scope
from vllm_multilora.store.job_messages import Checked, CheckOnly, Done, FromJob, Place, ToJob
from vllm_multilora.store.jobs import run_job
from vllm_multilora.store.messages import StoreSettings
from vllm_multilora.store.segments import SharedSegments

JOBS = 16
"""Python specializes a function after eight calls."""

_SCOPE = Scope("", (), (), allow_pickle=False, check_finite=True, signing_keys=None)


def rehearse(reader: AdapterReader) -> bool:
    """Runs jobs for a small adapter of the store's own.

    Args:
        reader: What they read with.

    Returns:
        Whether all have ended well. Where no adapter or no memory can be had they have not, and
        the store's jobs take longer.
    """
    with contextlib.suppress(OSError), TemporaryDirectory(prefix="multilora-") as folder:
        layout = write_sample(Path(folder))
        load = Load(0, Binding("", _SCOPE, 0), folder, [], [layout], StoreSettings())
        checked = _run(load, reader, CheckOnly(), [])
        if checked is None:
            return False
        sizes = np.frombuffer(checked.block_bytes, np.int64)
        places = np.cumsum(sizes) - sizes
        extent = -(-int(sizes.sum()) // PAGE) * PAGE
        place = Place(places.tobytes(), [(0, 0, extent)])
        segments = SharedSegments()
        try:
            segments.create(0, extent)
            descriptors = [segments.descriptor(0)]
            return all(_run(load, reader, place, descriptors) for _ in range(JOBS))
        finally:
            segments.close_all()
    return False


def _run(
    load: Load, reader: AdapterReader, answer: ToJob, descriptors: list[int]
) -> Checked | None:
    """Runs a job, which finds the answer to its question there already; returns the question."""
    ours, theirs = socket.socketpair()
    with closing(Channel[FromJob](ours, FromJob)) as channel:
        channel.send(answer, descriptors)
        run_job(theirs, load, reader)
        said = [message for message, _ in channel.receive()]
    if not said or not isinstance(said[-1], Done):
        return None
    return next(message for message in said if isinstance(message, Checked))
