"""Adapters on two vLLM workers behind Dynamo's frontend, which knows what each has in its cache.

    make dynamo

Starts the frontend, two workers with the demo's base model, and `vllm-multilora adapters sync`,
which has every worker serve every adapter of a folder: at once, and again after a worker was
started anew. Then asks each customer's question through the frontend, and serves until Ctrl-C.
"""

import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.append(str(Path(__file__).parents[1]))

import fleets
from base_model import build_base_model
from fleets import BASE
from processes import Child, started
from prompts import ADAPTED, ADAPTERS, MAX_LORA_RANK

BLOCK_SIZE = 32
"""Tokens of a block of the KV cache. vLLM's CPU workers do not take Dynamo's 16."""

_ENVIRONMENT = {
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_REQUEST_PLANE": "tcp",
    "DYN_EVENT_PLANE": "zmq",
    "DYN_LORA_ENABLED": "true",
    "DYN_LORA_HOTSWAP_ENABLED": "true",
    **fleets.SETTINGS,
}


@dataclass
class Worker:
    """One worker.

    Attributes:
        url: Of its system port, where adapters are loaded.
        metrics_port: Where it publishes what each step took; None for nothing of the kind.
        child: Its process.
    """

    url: str
    metrics_port: int | None = None
    child: Child | None = None
    stack: ExitStack = field(default_factory=ExitStack)


class Fleet(fleets.Fleet):
    """A frontend and its workers; they run until the block ends.

    Args:
        model: The base model's folder.
        workers: How many there are.
        step_metrics: Whether the first worker publishes what each step took, for Dynamo's planner:
            it then has a scheduler of Dynamo's.

    Attributes:
        url: The frontend's.
        workers: All workers.
    """

    def __init__(self, model: Path, *, workers: int = 2, step_metrics: bool = False) -> None:
        self._model = model
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.workers = [Worker(f"http://127.0.0.1:{free_port()}") for _ in range(workers)]
        if step_metrics:
            self.workers[0].metrics_port = free_port()

    def open(self, stack: ExitStack) -> None:
        """Starts the frontend and its workers."""
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-"))
        paths = {"DYN_FILE_KV": f"{folder}/kv", "DYN_LORA_PATH": f"{folder}/adapters"}
        self._environment = {**os.environ, **_ENVIRONMENT, **paths}
        options = ["--http-host", "127.0.0.1", "--http-port", str(self._port)]
        options += ["--router-mode", "kv", "--kv-cache-block-size", str(BLOCK_SIZE)]
        frontend = self._run("frontend", [sys.executable, "-m", "dynamo.frontend", *options])
        self.main = stack.enter_context(frontend)
        for worker in self.workers:
            stack.callback(worker.stack.close)
            self.start(worker)
        for worker in self.workers:
            self.await_start(worker)
        self.wait("base model", lambda: BASE in self.models())

    def start(self, worker: Worker) -> None:
        """Starts a worker, which has no adapters."""
        config = (
            '{"publisher": "zmq", "topic": "kv-events", "enable_kv_cache_events": true, '
            f'"endpoint": "tcp://*:{free_port()}"}}'
        )
        environment = {"DYN_SYSTEM_HOST": "127.0.0.1"}
        environment["DYN_SYSTEM_PORT"] = worker.url.rpartition(":")[2]
        if worker.metrics_port is not None:
            environment["DYN_FORWARDPASS_METRIC_PORT"] = str(worker.metrics_port)
        command = [
            *(sys.executable, "-m", "dynamo.vllm", "--model", str(self._model)),
            *("--served-model-name", BASE, "--dtype", "float32", "--max-model-len", "512"),
            *("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "512"),
            *("--block-size", str(BLOCK_SIZE), "--kv-events-config", config),
            *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "8"),
            *("--max-lora-rank", str(MAX_LORA_RANK)),
        ]
        name = f"worker-{self.workers.index(worker)}"
        worker.child = worker.stack.enter_context(self._run(name, command, environment))

    def kill(self, worker: Worker) -> None:
        """Ends a worker as the system does that has no memory left."""
        assert worker.child is not None
        worker.child.process.kill()
        worker.stack.close()

    def await_start(self, worker: Worker) -> None:
        """Waits until a worker takes adapters."""

        def takes_adapters() -> bool:
            assert worker.child is not None
            worker.child.check()
            return fleets.is_up(f"{worker.url}/v1/loras")

        self.wait(f"adapters at {worker.url}", takes_adapters)

    def models(self) -> set[str]:
        """What the frontend serves."""
        try:
            answer = httpx.get(f"{self.url}/v1/models", trust_env=False)
        except httpx.TransportError:
            return set()
        return {model["id"] for model in answer.json()["data"]} if answer.is_success else set()

    def sync_command(self, adapters: Path, *options: str) -> list[str]:
        """The command that has all workers serve a folder's adapters."""
        program = str(Path(sys.executable).with_name("vllm-multilora"))
        urls = [worker.url for worker in self.workers]
        return [program, "adapters", "sync", str(adapters), "--workers", *urls, *options]

    def _run(
        self, name: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> Any:
        return started(name, list(command), env={**self._environment, **(environment or {})})


def free_port() -> int:
    """A port of the loopback address that nobody listens at; Dynamo takes none above 32,767."""
    while True:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(20_000, 32_768)))
            return int(probe.getsockname()[1])


def main() -> None:
    """Runs the example."""
    stay = fleets.read_arguments(__doc__)
    print("Starting Dynamo's frontend and two workers ...", flush=True)
    with tempfile.TemporaryDirectory() as name, Fleet(build_base_model()) as fleet:
        adapters = Path(name) / "adapters"
        shutil.copytree(ADAPTERS, adapters)
        with started("sync", fleet.sync_command(adapters, "--every", "2"), stdout=None):
            names = {str(customer.adapter) for customer in ADAPTED}
            fleet.wait("adapters", lambda: names <= fleet.models())
            fleets.show(fleet)
            print(f"\n{fleet.url} serves {', '.join(sorted(fleet.models()))}", flush=True)
            print(f"Adapters are in {adapters}: what is put there is served.", flush=True)
            stay()


if __name__ == "__main__":
    main()
