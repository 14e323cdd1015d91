"""Seconds from the command line to the first `/health`, with the plugin and without.

`vllm serve --enable-lora` with SmolLM2-135M, each time a new interpreter with a store of its own.
Modules are compiled by the first start, as pip compiles those that it installs.
With `--base REV arms=plugin`, the other revision's starts are the control: servers are started
without the tests' helper, which starts those of another revision with other settings.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.smollm2 import base_model

ARMS = {"plugin": (), "stock": ("--no-multilora",)}
_LIMIT_S = 300.0
_POLL_S = 0.02


@benchmark(
    workload="`vllm serve --enable-lora` with SmolLM2-135M in bfloat16, from the command line to "
    "the first `/health`",
    control="stock vLLM (`--no-multilora`), in the same rounds",
    figure="the plugin's seconds over stock's",
    compares_to="1: a start that nobody can tell from stock's",
    quick={"rounds": 1},
)
def server_start(arms: str = "plugin,stock", rounds: int = 5) -> Iterable[Figure]:
    """Seconds from the command line to the first `/health`.

    Args:
        arms: `plugin`, `stock`, or both.
        rounds: Starts of each, in turn; one before them is not counted.
    """
    names = arms.split(",")
    started: dict[str, list[float]] = {name: [] for name in names}
    start(ARMS[names[0]])  # reads vLLM from disk
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            started[name].append(start(ARMS[name]))
            print(f"{name}: {started[name][-1]:.1f} s", file=sys.stderr, flush=True)
    for name in names:
        yield Figure(name, "start, s", started[name])
    if len(names) == len(ARMS):
        pairs = zip(started["plugin"], started["stock"], strict=True)
        yield Figure("plugin", "/ stock", [ours / theirs for ours, theirs in pairs])


def start(flags: Iterable[str]) -> float:
    """Starts a server, ends it, and returns the seconds until it was healthy.

    Raises:
        RuntimeError: It ended before, or took too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = base_model()
    with tempfile.TemporaryDirectory() as scratch, (Path(scratch) / "log").open("w+b") as log:
        began = time.perf_counter()
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
                *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "1024"),
                *("--kv-cache-memory-bytes", str(2**28), "--enforce-eager", "--enable-lora"),
                *("--max-loras", "8", "--max-lora-rank", "64", *flags),
            ],
            env=os.environ | {"MULTILORA_STORE_FOLDER": scratch, "PYTHONDONTWRITEBYTECODE": ""},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while not is_healthy(port):
                if server.poll() is not None or time.perf_counter() - began > _LIMIT_S:
                    log.seek(0)
                    raise RuntimeError(log.read()[-3000:].decode(errors="replace"))
                time.sleep(_POLL_S)
            seconds = time.perf_counter() - began
            server.terminate()
            server.wait(_LIMIT_S)
        finally:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    return seconds


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
