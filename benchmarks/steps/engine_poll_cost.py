"""What a step of the engine core pays to hear the store and its workers.

Each step looks at the store's socket and at the workers' link once. `nothing`: nothing has come,
as in nearly all steps. `a message`: the look that takes in one message of the store's, or one of
each rank's; the other side has sent it before. Both sides have what an engine core that sleeps is
woken by. Least mean over repeats, microseconds a look.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.harness.registry import Figure, benchmark
from vllm_multilora.integration.worker_link.fill_link import Filled, FillLink, WorkerLink
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.channel import Channel
from vllm_multilora.store.protocol.messages import Evicted, FromClient

RANKS = (1, 2, 8)
LOOKS = 500

Look = Callable[[], list]


class OneEnd:
    """A store of which only the socket is there."""

    path = Path("nowhere")

    def __init__(self) -> None:
        ours, self._theirs = socket.socketpair()
        self.channel: Channel[FromClient] = Channel(ours, FromClient)

    def connect(self) -> socket.socket:
        return self._theirs

    def last_words(self) -> str:
        return ""


@contextlib.contextmanager
def store() -> Iterator[tuple[Look, Callable[[], None]]]:
    """A client's look, and what sends it a message."""
    host = OneEnd()
    client = StoreClient(host, "server")
    client.start_waking(lambda: None)
    yield client.poll, lambda: host.channel.send(Evicted(7))
    client.close()
    host.channel.close()


@contextlib.contextmanager
def workers(ranks: int) -> Iterator[tuple[Look, Callable[[], None]]]:
    """A link's look, and what has each rank send a message."""
    link = FillLink(ranks)
    ends = [WorkerLink.attach(link.path, rank) for rank in range(ranks)]
    if link.attach_all():
        raise RuntimeError("not all ranks have connected")
    link.start_waking(lambda: None)

    def tell() -> None:
        for end in ends:
            end.tell(Filled(1, 0.001))

    yield link.poll, tell
    link.close()


def nothing(look: Look, repeats: int) -> float:
    """Microseconds of a look that finds nothing."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(LOOKS):
            look()
        best = min(best, time.perf_counter() - begin)
    return 1e6 * best / LOOKS


def something(look: Look, tell: Callable[[], None], messages: int, repeats: int) -> float:
    """Microseconds of a look that finds so many messages."""
    best = float("inf")
    for _ in range(repeats):
        total = 0.0
        for _ in range(LOOKS):
            tell()
            begin = time.perf_counter()
            came = look()
            total += time.perf_counter() - begin
            if len(came) != messages:
                raise RuntimeError(f"{len(came)} messages came, expected {messages}")
        best = min(best, total)
    return 1e6 * best / LOOKS


@benchmark(
    workload="one poll of the store's socket, and one of the workers' link",
    control="a poll that finds nothing",
    figure="microseconds per poll",
    compares_to="a step of the engine core, which takes milliseconds",
    quick={"repeats": 4},
)
def engine_poll_cost(repeats: int = 40) -> Iterable[Figure]:
    """What it costs a step of the engine core to poll the store and its workers."""
    with store() as (look, tell):
        yield Figure("the store", "nothing, µs", [nothing(look, repeats)])
        yield Figure("the store", "a message, µs", [something(look, tell, 1, repeats)])
    for ranks in RANKS:
        case = f"{ranks} worker{'s' * (ranks > 1)}"
        with workers(ranks) as (look, tell):
            yield Figure(case, "nothing, µs", [nothing(look, repeats)])
            yield Figure(case, "a message, µs", [something(look, tell, ranks, repeats)])
