"""An adapter per customer, from a directory: no registration, no restart.

Start the server, then put each customer's adapter into a sub-folder of its own:

    vllm serve MODEL --enable-lora --max-loras 16 --max-lora-rank 64 \
        --multilora-adapter-dir /adapters
    python examples/patterns/per_customer.py --url http://127.0.0.1:8000 --prompt "Hello"

asks every customer's adapter at the same time; the server batches them. To add a customer, copy
their adapter beside the others under a hidden name and rename it:

    cp -r trained/initech /adapters/.initech && mv /adapters/.initech /adapters/initech
"""

from __future__ import annotations

import argparse
import asyncio

import httpx
from client import URL, errors_in_one_line, problem, settings


async def customers(client: httpx.AsyncClient) -> list[str]:
    """The adapters and routes that the server shows; the base model is the one without a parent."""
    response = await client.get("/v1/models")
    response.raise_for_status()
    return [model["id"] for model in response.json()["data"] if model["parent"]]


async def answer(client: httpx.AsyncClient, customer: str, prompt: str, tokens: int) -> str:
    """One customer's answer, or what is wrong with the customer's adapter."""
    response = await client.post(
        "/v1/completions", json={"model": customer, "prompt": prompt, "max_tokens": tokens}
    )
    if response.status_code != httpx.codes.OK:
        return problem(response)
    return str(response.json()["choices"][0]["text"])


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=URL)
    parser.add_argument("--customer", action="append", help="default: all; may be repeated")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    async with httpx.AsyncClient(**settings(arguments.url)) as client:
        names = arguments.customer or await customers(client)
        answers = await asyncio.gather(
            *(answer(client, name, arguments.prompt, arguments.max_tokens) for name in names)
        )
    for name, text in zip(names, answers, strict=True):
        print(f"{name}: {text}")


if __name__ == "__main__":
    with errors_in_one_line():
        asyncio.run(main())
