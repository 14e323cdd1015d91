"""Adapters on two vLLM workers behind Dynamo's frontend, which knows what each has in its cache.

    make dynamo

Starts the frontend, two workers with the demo's base model, and `vllm-multilora adapters sync`,
which has every worker serve every adapter of a folder: at once, and again after a worker was
started anew. Then asks each customer's question through the frontend, and serves until Ctrl-C.
"""

import argparse
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

DEMO = Path(__file__).parents[1] / "demo"
sys.path.append(str(DEMO))

from base_model import build_base_model  # noqa: E402
from processes import Child, started  # noqa: E402
from prompts import ADAPTED, ADAPTERS, CUSTOMERS, MAX_LORA_RANK, Customer  # noqa: E402

BLOCK_SIZE = 32
"""Tokens of a block of the KV cache. vLLM's CPU workers do not take Dynamo's 16."""

START_LIMIT_S = 300.0
NEW_TOKENS = 40
_POLL_S = 0.5
_ENVIRONMENT = {
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_REQUEST_PLANE": "tcp",
    "DYN_EVENT_PLANE": "zmq",
    "DYN_LORA_ENABLED": "true",
    "DYN_LORA_HOTSWAP_ENABLED": "true",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
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
    metrics_port: int | None
    child: Child | None = None
    stack: ExitStack = field(default_factory=ExitStack)


class Fleet:
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
        self._stack = ExitStack()
        self._port, *ports = free_ports(1 + workers + step_metrics)
        self.url = f"http://127.0.0.1:{self._port}"
        first = ports.pop() if step_metrics else None
        metrics = [first, *[None] * (workers - 1)]
        self.workers = [
            Worker(f"http://127.0.0.1:{port}", each)
            for port, each in zip(ports, metrics, strict=True)
        ]

    def __enter__(self) -> Self:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dynamo-"))
        paths = {"DYN_FILE_KV": f"{folder}/kv", "DYN_LORA_PATH": f"{folder}/adapters"}
        self._environment = {**os.environ, **_ENVIRONMENT, **paths}
        options = ["--http-host", "127.0.0.1", "--http-port", str(self._port)]
        options += ["--router-mode", "kv", "--kv-cache-block-size", str(BLOCK_SIZE)]
        try:
            self._frontend = self._stack.enter_context(
                self._run("frontend", [sys.executable, "-m", "dynamo.frontend", *options])
            )
            for worker in self.workers:
                self.start(worker)
            for worker in self.workers:
                self.await_start(worker)
            self.wait("the frontend to name the base model", lambda: "base" in self.models())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.stack.close()
        self._stack.close()

    def start(self, worker: Worker) -> None:
        """Starts a worker, which has no adapters."""
        [events] = free_ports(1)
        config = (
            '{"publisher": "zmq", "topic": "kv-events", "enable_kv_cache_events": true, '
            f'"endpoint": "tcp://*:{events}"}}'
        )
        environment = {"DYN_SYSTEM_HOST": "127.0.0.1"}
        environment["DYN_SYSTEM_PORT"] = worker.url.rpartition(":")[2]
        if worker.metrics_port is not None:
            environment["DYN_FORWARDPASS_METRIC_PORT"] = str(worker.metrics_port)
        command = [
            *(sys.executable, "-m", "dynamo.vllm", "--model", str(self._model)),
            *("--served-model-name", "base", "--dtype", "float32", "--max-model-len", "512"),
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

        def answers() -> bool:
            assert worker.child is not None
            worker.child.check()
            try:
                return httpx.get(f"{worker.url}/v1/loras", trust_env=False).is_success
            except httpx.TransportError:
                return False

        self.wait(f"{worker.url} to take adapters", answers)

    def models(self) -> set[str]:
        """What the frontend serves."""
        try:
            answer = httpx.get(f"{self.url}/v1/models", trust_env=False)
        except httpx.TransportError:
            return set()
        return {model["id"] for model in answer.json()["data"]} if answer.is_success else set()

    def wait(
        self, what: str, condition: Callable[[], bool], limit_s: float = START_LIMIT_S
    ) -> None:
        """Waits until something is true.

        Raises:
            SystemExit: It is not within the limit, or the frontend has ended.
        """
        end = time.monotonic() + limit_s
        while not condition():
            self._frontend.check()
            if time.monotonic() > end:
                self._frontend.fail(f"has not been ready: no {what} within {limit_s:.0f} s")
            time.sleep(_POLL_S)

    def ask(self, customer: Customer, **fields: Any) -> httpx.Response:
        """Asks a customer's question."""
        body = {
            "model": customer.adapter or "base",
            "messages": [{"role": "user", "content": customer.prompt}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            **fields,
        }
        url = f"{self.url}/v1/chat/completions"
        return httpx.post(url, json=body, timeout=120.0, trust_env=False)

    def sync_command(self, adapters: Path, *options: str) -> list[str]:
        """The command that has all workers serve a folder's adapters."""
        program = str(Path(sys.executable).with_name("vllm-multilora"))
        urls = [worker.url for worker in self.workers]
        return [program, "adapters", "sync", str(adapters), "--workers", *urls, *options]

    def _run(
        self, name: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> Any:
        return started(name, list(command), env={**self._environment, **(environment or {})})


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens at; Dynamo takes none above 32,767."""
    sockets: list[socket.socket] = []
    try:
        for port in random.sample(range(20_000, 32_768), 50 * count):
            each = socket.socket()
            sockets.append(each)
            with suppress(OSError):
                each.bind(("127.0.0.1", port))
        return [each.getsockname()[1] for each in sockets if each.getsockname()[1]][:count]
    finally:
        for each in sockets:
            each.close()


def main() -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end when all questions are answered")
    once = parser.parse_args().once
    print("Starting Dynamo's frontend and two workers ...", flush=True)
    with tempfile.TemporaryDirectory() as name, Fleet(build_base_model()) as fleet:
        adapters = Path(name) / "adapters"
        shutil.copytree(ADAPTERS, adapters)
        with started("sync", fleet.sync_command(adapters, "--every", "2"), stdout=None):
            names = {str(customer.adapter) for customer in ADAPTED}
            fleet.wait("all adapters", lambda: names <= fleet.models())
            with ThreadPoolExecutor(len(CUSTOMERS)) as threads:
                for customer, answer in zip(
                    CUSTOMERS, threads.map(fleet.ask, CUSTOMERS), strict=True
                ):
                    text = answer.raise_for_status().json()["choices"][0]["message"]["content"]
                    print(f"\n{customer.adapter or 'base'}: {customer.prompt}\n  {text!r}")
            print(f"\n{fleet.url} serves {', '.join(sorted(fleet.models()))}", flush=True)
            print(f"Adapters are in {adapters}: what is put there is served.", flush=True)
            try:
                while not once:
                    time.sleep(1)
            except KeyboardInterrupt:
                pass


if __name__ == "__main__":
    main()
