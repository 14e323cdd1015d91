"""A new version of an adapter, deployed while the old one serves.

The server was started with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`. If it has an admin
key, only that key loads adapters: put it into `VLLM_API_KEY`.

    python examples/patterns/continuous_deployment.py --url http://127.0.0.1:8000 \
        --name acme --path /adapters/acme-v8 --check "What is a tort?"

1. Registers the new version as `acme-candidate`. The server checks its files; if anything is wrong
   it says all of it, nothing has changed, and this script ends with status 1.
2. Asks the candidate the check prompts. Here any answer will do: put your own evaluation into
   `is_good`.
3. Loads it under the public name, in place: requests in flight end on the old weights, new ones
   begin on the new, and the old version's memory is freed.
4. Unloads the candidate.
"""

from __future__ import annotations

import argparse
import sys

import httpx
from client import URL, errors_in_one_line, problem, settings


class RefusedError(Exception):
    """The server, or the check, does not want the new version."""


def load(client: httpx.Client, name: str, path: str) -> None:
    """Registers an adapter, or a new version of one."""
    response = client.post(
        "/v1/load_lora_adapter",
        json={"lora_name": name, "lora_path": path, "load_inplace": True},
    )
    if response.status_code != httpx.codes.OK:
        raise RefusedError(problem(response))


def unload(client: httpx.Client, name: str) -> None:
    """Forgets an adapter and frees its memory."""
    client.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()


def is_good(client: httpx.Client, name: str, prompt: str) -> bool:
    """Whether an adapter answers a prompt as it should: the place for an evaluation."""
    response = client.post(
        "/v1/completions",
        json={"model": name, "prompt": prompt, "max_tokens": 32, "temperature": 0},
    )
    return response.status_code == httpx.codes.OK and bool(response.json()["choices"][0]["text"])


def deploy(client: httpx.Client, name: str, path: str, checks: list[str]) -> None:
    """Steps 1 to 4."""
    candidate = f"{name}-candidate"
    load(client, candidate, path)
    try:
        for prompt in checks:
            if not is_good(client, candidate, prompt):
                raise RefusedError(f"the candidate fails on {prompt!r}; {name} stays as it was")
        load(client, name, path)
    finally:
        unload(client, candidate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=URL)
    parser.add_argument("--name", required=True, help="under which customers know the adapter")
    parser.add_argument("--path", required=True, help="folder of the new version, on the server")
    parser.add_argument("--check", action="append", default=[], help="a prompt; may be repeated")
    arguments = parser.parse_args()
    with httpx.Client(**settings(arguments.url)) as client:
        try:
            deploy(client, arguments.name, arguments.path, arguments.check)
        except RefusedError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{arguments.name} is served from {arguments.path}")
    return 0


if __name__ == "__main__":
    with errors_in_one_line():
        sys.exit(main())
