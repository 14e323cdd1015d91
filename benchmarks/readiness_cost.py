"""What the readiness log takes of an engine step, and of a rank that writes to it.

    python benchmarks/readiness_cost.py

`nothing new`: the drain of nearly every step. `one event a rank`: every rank has said something
since. Minimum over repeats, microseconds; the log lies where an engine would put it.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.readiness_events import Event, Failed, Ready
from vllm_multilora.cache.readiness_log import ReadinessLog, attach_writer

RANKS = (1, 2, 8)
CALLS = 2_000
REPEATS = 15
FAILED = Failed(7, 1, LoadFailure(FailureKind.INVALID, "x" * 300))
READY = Ready(7, 1)


def microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    """Least time of a call, over repeats of many."""
    return min(timeit.repeat(call, number=calls, repeat=REPEATS)) / calls * 1e6


def measure(ranks: int) -> tuple[float, ...]:
    """Times of an empty drain, of one with news, and of writing either event."""
    log = ReadinessLog(f"readiness-cost-{ranks}", ranks)
    writers = [attach_writer(log.path, rank) for rank in range(ranks)]
    log.seal()

    def write(event: Event) -> None:
        for writer in writers:
            writer.append(event)

    def write_and_drain() -> None:
        write(READY)
        if len(log.drain()) != ranks:
            raise RuntimeError("the log lost events while being measured")

    log.drain()
    empty = microseconds(log.drain)
    both = microseconds(write_and_drain)
    ready = microseconds(lambda: write(READY))
    failed = microseconds(lambda: write(FAILED))
    for end in (*writers, log):
        end.close()
    return empty, both - ready, ready / ranks, failed / ranks


def main() -> None:
    """Prints the table."""
    columns = ("ranks", "nothing new", "one event a rank", "write ready", "write failed")
    print("readiness log, microseconds")
    print("  ".join(columns))
    for ranks in RANKS:
        cells = (f"{ranks}", *(f"{time:.2f}" for time in measure(ranks)))
        print("  ".join(cell.rjust(len(name)) for cell, name in zip(cells, columns, strict=True)))


if __name__ == "__main__":
    main()
