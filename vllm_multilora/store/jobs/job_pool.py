"""Running jobs, and killed jobs that have not exited yet."""

from __future__ import annotations

import selectors
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_multilora.adapters.blend import MAX_PARTS, folders_of, title
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.jobs.runner import End, Runner, RunningJob
from vllm_multilora.store.jobs.sandbox import cpu_limit_s
from vllm_multilora.store.loads.loads import Loads
from vllm_multilora.store.memory.entries import Load
from vllm_multilora.store.protocol import job_messages as msg
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError

MAX_STUCK = 16
"""Killed jobs of one source that may be stuck before no more are started for it."""

BRIEF_S = 0.1
"""Seconds of processor time at the model's own priority.

A small adapter is read and checked in a third of that, and its requests wait for it. Whatever takes
longer, a large adapter or a hostile one, would slow down others' tokens: it gives way to them.
"""

_LOOK_AT_BRIEF_S = 0.05
_SOON_S = 1.0  # a killed job that has not ended by then is stuck
_LOOK_S = 0.005
_LOOK_AT_STUCK_S = 0.5


@dataclass(eq=False)
class _Job:
    load: Load
    running: RunningJob
    channel: Channel[msg.FromJob]
    turn_to_say: type[msg.FromJob] | None = msg.Opened
    killed: float = 0.0
    is_brief: bool = True


class JobPool:
    """Starts jobs, passes on what they say, and waits for their ends."""

    def __init__(
        self, runner: Runner, reader: AdapterReader, selector: selectors.BaseSelector
    ) -> None:
        self._runner = runner
        self._reader = reader
        self._selector = selector
        self._jobs: dict[int, _Job] = {}
        self._ending: dict[int, _Job] = {}

    def start(self, load: Load) -> None:
        """Starts a load's job; raises OSError."""
        running, sock = self._runner.start(load, self._reader)
        sock.setblocking(False)
        channel: Channel[msg.FromJob] = Channel(sock, msg.FromJob)
        self._jobs[load.number] = _Job(load, running, channel)
        self._selector.register(channel, selectors.EVENT_READ, load.number)

    def tell(self, number: int, message: msg.ToJob, descriptors: list[int]) -> None:
        """Tells a job; raises OSError where it cannot be told. A job that has gone is no matter."""
        job = self._jobs.get(number)
        if job is None:
            return
        job.turn_to_say = msg.Done
        try:
            job.channel.send(message, descriptors)
            job.channel.wait_in(self._selector)
        except ChannelClosedError:
            self.kill(number)

    def kill(self, number: int) -> None:
        """Ends a job; `gone`, of the loads, says when it has."""
        job = self._jobs.pop(number, None)
        if job is not None:
            self._selector.unregister(job.channel)
            job.channel.close()
            job.killed = time.monotonic()
            self._ending[number] = job
            job.running.kill()

    def kill_all(self) -> None:
        for number in list(self._jobs):
            self.kill(number)

    def hear(self, number: int, loads: Loads) -> None:
        """Passes on what a job says, and sends it what it has not taken yet."""
        job = self._jobs.get(number)
        if job is None:
            return
        try:
            for message, _ in job.channel.receive():
                if number in self._jobs:
                    _hear(job, message, loads)
            if number in self._jobs:
                job.channel.flush()
                job.channel.wait_in(self._selector)
        except ChannelClosedError:
            self.kill(number)

    def look(self, loads: Loads) -> None:
        """Notes who works, who has worked for long, and who has ended."""
        for number, job in self._jobs.items():
            if not (job.is_brief or loads.queue.queued):
                continue
            use = job.running.use()
            if job.is_brief and use.processor_s >= BRIEF_S:
                job.is_brief = not job.running.yield_processors()
            if loads.queue.queued:
                loads.queue.looked_at(number, use.processor_s, _now(), is_ready=use.is_ready)
        for number, job in list(self._ending.items()):
            end = job.running.gone()
            if end is not None:
                del self._ending[number]
                loads.gone(number, _failure_of(job, end), _now())

    def next_look(self) -> float | None:
        """When to look at jobs and for their ends again."""
        now = _now()
        pauses = [
            _LOOK_S if now - job.killed < _SOON_S else _LOOK_AT_STUCK_S
            for job in self._ending.values()
        ]
        if any(job.is_brief for job in self._jobs.values()):
            pauses.append(_LOOK_AT_BRIEF_S)
        return now + min(pauses) if pauses else None

    @property
    def reading(self) -> int:
        return len(self._jobs)

    @property
    def stuck(self) -> int:
        return len(self._stuck())

    def refusal(self, path: str) -> str | None:
        """Why no job is to be started for a folder: too many hang there already."""
        stuck = self._stuck()
        if len(stuck) < MAX_STUCK:
            return None
        mounts = _mount_points()
        hanging = Counter(source for job in stuck for source in _sources_of(job.load.path, mounts))
        source, count = max(
            ((source, hanging[source]) for source in _sources_of(path, mounts)),
            key=lambda item: item[1],
        )
        if count < MAX_STUCK:
            return None
        return (
            f"{title(path)}: {count} checks of adapters below {source} do not end, even when "
            "killed: its storage hangs; adapters there are tried again when it answers"
        )

    def _stuck(self) -> list[_Job]:
        now = _now()
        return [job for job in self._ending.values() if now - job.killed >= _SOON_S]


def _failure_of(job: _Job, end: End) -> msg.Failure:
    """What a job's end without an answer means."""
    limit_s = job.load.settings.timeout_s
    if end.kind is FailureKind.TIMEOUT:
        message = (
            f"{title(job.load.path)}: reading and checking it has used up the processor time that "
            f"one adapter may take ({cpu_limit_s(limit_s)} s, from the time limit of {limit_s:g} s)"
        )
        return msg.Failure(FailureKind.TIMEOUT, message, [])
    message = f"{title(job.load.path)}: the process that read it {end.how}, without an answer"
    return msg.Failure(end.kind, message, [])


def _hear(job: _Job, message: msg.FromJob, loads: Loads) -> None:
    """Tells the loads what a job says; what makes no sense is its failure."""
    try:
        if not isinstance(message, msg.Failure):
            if type(message) is not job.turn_to_say:
                raise ValueError(f"{type(message).__name__} out of turn")
            job.turn_to_say = msg.Checked if isinstance(message, msg.Opened) else None
        _pass_on(job.load.number, message, loads)
    except ValueError as error:
        found = f"{title(job.load.path)}: what its check says makes no sense: {error}"
        loads.failed(job.load.number, msg.Failure(FailureKind.INTERNAL, found, []), _now())


def _pass_on(number: int, message: msg.FromJob, loads: Loads) -> None:
    """Tells the loads; raises ValueError for what no honest job says."""
    match message:
        case msg.Opened(version):
            loads.opened(number, version[:1024], _now())
        case msg.Checked(contents, data):
            blocks = np.frombuffer(data, np.int64)
            if not len(blocks) or (blocks <= 0).any() or (blocks % 64).any():
                raise ValueError("blocks are not positive multiples of 64 bytes")
            if blocks.max() > 1 << 40 or float(blocks.sum(dtype=np.float64)) > float(1 << 50):
                raise ValueError("blocks are too large")
            tokens = contents.invocation_tokens
            if len(tokens) > 64 or any(not 0 <= token < 1 << 31 for token in tokens):
                raise ValueError("invocation tokens")
            loads.checked(number, contents, blocks, _now())
        case msg.Done(digest, nbytes, parts):
            if any(len(each) != 64 for each in (digest, *parts)) or not 0 <= nbytes < 1 << 50:
                raise ValueError("digest or size")
            if len(parts) > MAX_PARTS:
                raise ValueError("parts")
            loads.done(number, digest, nbytes, _now(), parts)
        case msg.Failure():
            loads.failed(number, message.bounded(), _now())


def _mount_points() -> list[str]:
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.split(" ")[1].replace("\\040", " ") for line in lines]


def _sources_of(path: str, mounts: list[str]) -> set[str]:
    """The mount points that an adapter's folders are below; a folder's parent for the root."""
    found = set()
    for folder in folders_of(path):
        below = [point for point in mounts if folder == point or folder.startswith(f"{point}/")]
        found.add(max(below, key=len, default=str(Path(folder).parent)))
    return found


def _now() -> float:
    return time.monotonic()
