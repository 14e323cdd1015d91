"""Object stores of the tests' and benchmarks' own, started as programs on the loopback address."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.serving.server import free_port

PATIENT_S = 120.0


@contextmanager
def running(
    command: Sequence[str | Path], look: Callable[[], None], path: str | None = None
) -> Iterator[None]:
    """Runs a program while the block runs, which begins when the program answers.

    Args:
        command: The program and its arguments.
        look: Raises OSError until it answers.
        path: Where it finds other programs, as in PATH; None: where this process does.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | ({} if path is None else {"PATH": path}),
    )
    deadline = time.monotonic() + PATIENT_S
    try:
        while True:
            try:
                look()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} has ended"
                assert time.monotonic() < deadline, f"{command[0]} does not answer"
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a real implementation of S3, without buckets."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    program = Path(sys.executable).with_name("moto_server")
    with running(
        [program, "-H", "127.0.0.1", "-p", str(port)],
        lambda: urllib.request.urlopen(f"{address}/moto-api/", timeout=5).close(),
    ):
        yield address


def put_publicly(address: str, content: bytes = b"") -> None:
    """Makes a bucket, or puts an object into one, that anybody may read without credentials."""
    headers = {"x-amz-acl": "public-read", "content-type": "application/octet-stream"}
    request = urllib.request.Request(address, content, headers, method="PUT")
    urllib.request.urlopen(request, timeout=60).close()
