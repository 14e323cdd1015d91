"""Streams, events and threads that note what is ordered before what, by vector clocks.

Each host thread and each stream is an actor with a clock that says how far into every actor's past
it can see. A piece of work on a stream comes after what the stream has seen and after what the
thread had seen that queued it. An event keeps the clock of its stream; whoever waits for it sees as
far. Two accesses to the same memory, one of them a write, must be ordered; if not, they are a race,
on some card, some day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Clock = dict[str, int]


def merge(into: Clock, other: Clock) -> None:
    for actor, time in other.items():
        into[actor] = max(into.get(actor, 0), time)


@dataclass
class Access:
    """A read or a write: of whom, when, and what of others it comes after."""

    actor: str
    time: int
    after: Clock
    writes: bool
    label: str

    def is_before(self, other: Access) -> bool:
        return other.after.get(self.actor, 0) >= self.time


@dataclass
class World:
    """All actors, and the races that were found."""

    clocks: dict[str, Clock] = field(default_factory=dict)
    thread: str = "main"
    stream: str = "steps"
    races: set[tuple[str, str, str]] = field(default_factory=set)
    _accesses: dict[str, list[Access]] = field(default_factory=dict)

    def clock(self, actor: str) -> Clock:
        return self.clocks.setdefault(actor, {})

    def on_host(self, label: str, *, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()):
        self._happens(self.thread, label, reads, writes)

    def on_stream(self, label: str, *, reads: tuple[str, ...] = (), writes: tuple[str, ...] = ()):
        merge(self.clock(self.stream), self.clock(self.thread))
        self._happens(self.stream, label, reads, writes)

    def accesses(self, memory: str) -> list[Access]:
        """What has been noted of some memory, in the order in which it was."""
        return self._accesses.get(memory, [])

    def _happens(self, actor: str, label: str, reads: Any, writes: Any) -> None:
        clock = self.clock(actor)
        clock[actor] = clock.get(actor, 0) + 1
        for memory, does_write in [*((m, False) for m in reads), *((m, True) for m in writes)]:
            access = Access(actor, clock[actor], dict(clock), does_write, label)
            earlier = self._accesses.setdefault(memory, [])
            for other in earlier:
                if (other.writes or does_write) and not other.is_before(access):
                    self.races.add((memory, other.label, label))
            earlier.append(access)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    def synchronize(self) -> None:
        """The thread waits for all streams."""
        for actor, clock in self.clocks.items():
            if actor in ("steps", "copies"):
                merge(self.clock(self.thread), clock)

    def current_stream(self, device: Any = None) -> Stream:
        return Stream(self, self.stream)

    def event(self) -> Event:
        return Event(self)


@dataclass
class Event:
    """As `torch.cuda.Event`."""

    world: World
    recorded: Clock | None = None

    def record(self) -> Event:
        merge(self.world.clock(self.world.stream), self.world.clock(self.world.thread))
        self.recorded = dict(self.world.clock(self.world.stream))
        return self

    def synchronize(self) -> None:
        merge(self.world.clock(self.world.thread), self.recorded or {})


@dataclass
class Stream:
    """As `torch.cuda.Stream`."""

    world: World
    name: str = "copies"

    def record_event(self, event: Event | None = None) -> Event:
        with self.world.on(self):
            return (event or self.world.event()).record()

    def wait_event(self, event: Event) -> None:
        merge(self.world.clock(self.name), event.recorded or {})


class Result(Future):
    """Result of work on the other thread; whoever reads it comes after that work."""

    world: World
    seen: Clock
    is_seen = False

    def done(self) -> bool:
        return self.is_seen

    def result(self, timeout: float | None = None) -> Any:
        merge(self.world.clock(self.world.thread), self.seen)
        self.is_seen = True
        return super().result(timeout)


class OtherThread:
    """Runs what is submitted at once, as a thread that sees no more than it was handed."""

    def __init__(self, world: World) -> None:
        self.world = world

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Result:
        world, future = self.world, Result()
        before, stream = world.thread, world.stream
        merge(world.clock("fills"), world.clock(before))
        world.thread = "fills"
        future.set_result(function(*arguments))
        future.world, future.seen = world, dict(world.clock("fills"))
        world.thread, world.stream = before, stream
        return future
