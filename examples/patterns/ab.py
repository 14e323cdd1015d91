"""An A/B test: asks a route as many customers, and counts which adapter answered each.

Start the server with the routes of examples/routing/ab.yaml:

    vllm serve MODEL --enable-lora --max-loras 16 --max-lora-rank 64 \
        --lora-modules v2-stable=/adapters/v2 v3-candidate=/adapters/v3 \
        --multilora-routes examples/routing/ab.yaml
    python examples/patterns/ab.py --url http://127.0.0.1:8000 --prompt "Hello"

A customer keeps an adapter for as long as the weights stay: run it twice.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter

import httpx
from client import URL, errors_in_one_line, settings


async def adapter_of(client: httpx.AsyncClient, route: str, user: str, prompt: str) -> str:
    """The adapter that answers a customer."""
    response = await client.post(
        "/v1/completions", json={"model": route, "user": user, "prompt": prompt, "max_tokens": 1}
    )
    response.raise_for_status()
    return response.headers["x-multilora-adapter"]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=URL)
    parser.add_argument("--route", default="assistant")
    parser.add_argument("--customers", type=int, default=100)
    parser.add_argument("--prompt", required=True)
    arguments = parser.parse_args()
    async with httpx.AsyncClient(**settings(arguments.url)) as client:
        adapters = await asyncio.gather(
            *(
                adapter_of(client, arguments.route, f"customer-{number}", arguments.prompt)
                for number in range(arguments.customers)
            )
        )
    for name, count in Counter(adapters).most_common():
        print(f"{name}: {count} of {arguments.customers} customers")


if __name__ == "__main__":
    with errors_in_one_line():
        asyncio.run(main())
