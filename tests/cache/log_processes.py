"""What the processes of the readiness log's tests do; imported by them when they start."""

import time

from vllm_multilora.cache.load_failures import FailureKind, LoadFailure
from vllm_multilora.cache.readiness_events import Failed, Lost, Ready
from vllm_multilora.cache.readiness_log import ReadinessLog, attach_writer


def events_of(rank, count):
    """A sequence of events that is different for each rank."""
    kinds = [
        lambda n: Ready(n, rank),
        lambda n: Lost(n),
        lambda n: Failed(n, rank, LoadFailure(FailureKind.GONE, f"rank {rank} " + "é" * (n % 160))),
    ]
    return [kinds[(n + rank) % 3](n) for n in range(count)]


def write_events(path, rank, count, attached, room):
    """Writes events, as long as the reader has left room for them in the ring."""
    writer = attach_writer(path, rank)
    attached.release()
    for event in events_of(rank, count):
        room.acquire()
        writer.append(event)
    writer.close()


def write_until_killed(path, rank, attached):
    writer = attach_writer(path, rank)
    serial = 0
    while True:
        writer.append(Ready(rank, serial))
        serial += 1
        if serial == 100:
            attached.release()


def create_and_hold(instance_id, folder, created):
    """An engine that made its log and never came to seal it."""
    log = ReadinessLog(instance_id, 1, folder=folder)
    created.put(log.path)
    time.sleep(600)


def create_and_exit(instance_id, folder, created):
    """An engine that ends in order, but without closing its log."""
    log = ReadinessLog(instance_id, 1, folder=folder)
    created.put(log.path)


def try_to_attach(path, rank, outcome):
    try:
        attach_writer(path, rank)
        outcome.put("attached")
    except Exception as error:
        outcome.put(f"{type(error).__name__}: {error}")
