"""One name for all tasks: the request's metadata says which, and the route finds the adapter.

Start the server with the routes of examples/routing/per-task.yaml:

    vllm serve MODEL --served-model-name base --enable-lora --max-loras 16 --max-lora-rank 64 \
        --lora-modules medical-qa=/adapters/medical legal-review=/adapters/legal \
        --multilora-routes examples/routing/per-task.yaml
    python examples/patterns/per_task.py --url http://127.0.0.1:8000 --prompt "Hello" \
        --task medical --task legal --task poetry

The `openai` package sends the same with `metadata={"task": "medical"}`.
"""

from __future__ import annotations

import argparse

import httpx
from client import URL, errors_in_one_line, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=URL)
    parser.add_argument("--route", default="helper")
    parser.add_argument("--task", action="append", required=True, help="may be repeated")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    with httpx.Client(**settings(arguments.url)) as client:
        for task in arguments.task:
            response = client.post(
                "/v1/completions",
                json={
                    "model": arguments.route,
                    "metadata": {"task": task},
                    "prompt": arguments.prompt,
                    "max_tokens": arguments.max_tokens,
                },
            )
            response.raise_for_status()
            body = response.json()  # its "model" names the adapter too
            print(f"{task} -> {body['model']}: {body['choices'][0]['text']}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
