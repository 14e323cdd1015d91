"""Serves an activated adapter beside its base model, and shows that both share one context.

    python examples/activated/shared_context.py

Trains the adapter of `train.py` first, if it is not there. Then plain `vllm serve`, and twice two
requests with the same chat messages: the base model answers the customer, and the adapter writes
the ticket. Whoever comes second finds the conversation in the KV cache, whoever came first:
`cached_tokens` in its `usage` says how much of it.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import httpx

_HERE = Path(__file__).parent
sys.path[:0] = [str(_HERE), str(_HERE.parent / "demo")]
from base_model import build_base_model  # noqa: E402
from demo import ENVIRONMENT, free_port, wait_until_ready  # noqa: E402
from processes import started  # noqa: E402
from prompts import KV_CACHE_BYTES  # noqa: E402
from train import OUTPUT, save, train  # noqa: E402

BASE, ADAPTER = "base", "ticket"
MARKER = "Team: "
BLOCK = 32
"""Tokens of a block of the KV cache; whole ones are shared."""

RULES = (
    "You answer customers of a shop for household goods. Be short, polite and helpful. "
    "Parcels take three to five days. A customer whose parcel has not come after ten days gets a "
    "new one, or the money back, as they like. Goods can be sent back within thirty days, and the "
    "shop pays for it where they are broken. Refunds take up to a week. Invoices can be had again "
    "from the account's page at any time. Passwords are set anew by a link that is sent to the "
    "account's email address; nobody is ever asked for a password. Furniture comes on a day that "
    "the customer chooses, between eight and eighteen o'clock. Never promise what is not said here."
)
MESSAGES = (
    "Hello. I ordered a coffee machine twelve days ago, and it has not arrived yet. What now?",
    "The mirror that you sent me has a crack. My mother's birthday is tomorrow!",
)


def ask(url: str, model: str, message: str) -> tuple[str, int, int]:
    """One chat completion.

    Returns:
        The answer, the prompt's tokens, and how many of them were in the cache.
    """
    body = {
        "model": model,
        "messages": [
            {"role": "system", "content": RULES},
            {"role": "user", "content": message},
        ],
        "temperature": 0,
        "max_tokens": 40,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    usage = answer["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return answer["choices"][0]["message"]["content"].strip(), usage["prompt_tokens"], cached


def show(url: str) -> bool:
    """Asks for both messages; returns whether contexts were shared and tickets look like some."""
    is_as_it_should = True
    for message, order in zip(MESSAGES, ((BASE, ADAPTER), (ADAPTER, BASE)), strict=True):
        print(f"\n  Customer: {message}")
        for place, model in enumerate(order):
            answer, tokens, cached = ask(url, model, message)
            print(f"  {model:>6}: {answer}\n          ({tokens} prompt tokens, {cached} cached)")
            # The second one: all whole blocks before the invocation, which are the last few tokens.
            is_as_it_should &= not place or tokens - cached < 2 * BLOCK
            is_as_it_should &= model == BASE or answer.startswith(MARKER)
    return is_as_it_should


def serve_command(model: Path, adapter: Path, port: int) -> list[str]:
    """The command line of the server: vLLM's own."""
    return [
        *("serve", str(model), "--served-model-name", BASE),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
        *("--block-size", str(BLOCK), "--enable-prompt-tokens-details"),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--enable-lora", "--max-loras", "1", "--max-lora-rank", "16"),
        *("--lora-modules", f"{ADAPTER}={adapter}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Share a context with an activated adapter.")
    parser.add_argument("--adapter", type=Path, default=OUTPUT, metavar="DIR")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    checkpoint = build_base_model()
    if not (arguments.adapter / "adapter_config.json").exists():
        print(f"Training {arguments.adapter}")
        save(train(checkpoint), arguments.adapter)
    port = free_port()
    command = serve_command(checkpoint, arguments.adapter, port)
    print(f"$ vllm {' '.join(command)}")
    # `python -m`, so that it is this Python's vLLM whatever the PATH says.
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    with started("vllm-serve", [*vllm, *command]) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, server, [])
        return 0 if show(url) else 1


if __name__ == "__main__":
    sys.exit(main())
