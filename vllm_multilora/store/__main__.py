"""Runs a store: `python -m vllm_multilora.store --socket-fd N`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import importlib
import logging
import os
import resource
import signal
import socket
import sys

from vllm_multilora.store.store_launch import READER


def main() -> int:
    options = _parse()
    if options.detach and os.fork():
        # Whoever started this process ends its children when it ends; the store is to outlive it.
        os._exit(0)
    _prepare_process(options.processors)
    # Before NumPy is imported: its threads would make it unsafe to fork, and are of no use here.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    from vllm_multilora.store.jobs.runner import ForkRunner
    from vllm_multilora.store.jobs.sandbox import prepare as prepare_sandbox
    from vllm_multilora.store.rehearsal import rehearse
    from vllm_multilora.store.server import StoreServer

    module, _, name = options.reader.partition(":")
    reader = getattr(importlib.import_module(module), name)()
    listener = _numbered_above_clients(socket.socket(fileno=options.socket_fd))
    log = sys.stderr.fileno() if options.detach else None  # else it is whoever started this one's
    server = StoreServer(listener, ForkRunner(log), reader, keep=options.keep)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    prepare_sandbox()
    if not rehearse(reader):
        logging.warning("No adapter could be read in rehearsal: loads take longer")
    gc.collect()
    gc.freeze()
    server.run()
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m vllm_multilora.store", description=__doc__)
    parser.add_argument(
        "--socket-fd", type=int, required=True, help="a listening socket that was handed over"
    )
    parser.add_argument("--keep", action="store_true", help="go on without clients")
    parser.add_argument("--detach", action="store_true", help="go on as a process of its own")
    parser.add_argument("--processors", default="", help="where to run, such as 0,1,2")
    # Tests have a reader of their own.
    parser.add_argument("--reader", default=READER, help=argparse.SUPPRESS)
    return parser.parse_args()


def _numbered_above_clients(listener: socket.socket) -> socket.socket:
    """The listener under a number that is higher than those of its clients' connections.

    Linux closes those of a process that ends from the highest down: whoever hears of the end, as a
    connection has closed, must not reach this store again.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = min(limit, 1024) - 1  # the system has room for so many in any process
    if listener.fileno() >= highest:
        return listener
    with listener:
        return socket.socket(fileno=fcntl.fcntl(listener, fcntl.F_DUPFD_CLOEXEC, highest))


def _prepare_process(processors: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="multilora store: %(message)s")
    if processors:
        with contextlib.suppress(OSError, ValueError):
            os.sched_setaffinity(0, {int(number) for number in processors.split(",")})
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
