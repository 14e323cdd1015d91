"""One name for all languages: asks a route in several, and shows which adapter answered.

Start the server with the routes of examples/routing/per-language.yaml:

    vllm serve MODEL --enable-lora --max-loras 16 --max-lora-rank 64 \
        --lora-modules support-en=/adapters/en support-fr=/adapters/fr support-de=/adapters/de \
        --multilora-routes examples/routing/per-language.yaml
    python examples/patterns/per_language.py --url http://127.0.0.1:8000 --prompt "Hello" \
        --language fr --language "de-AT, en;q=0.5"

A browser sends its user's languages by itself; here they are given.
"""

from __future__ import annotations

import argparse

import httpx
from client import URL, errors_in_one_line, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default=URL)
    parser.add_argument("--route", default="support")
    parser.add_argument("--language", action="append", required=True, help="may be repeated")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    with httpx.Client(**settings(arguments.url)) as client:
        for language in arguments.language:
            response = client.post(
                "/v1/completions",
                json={
                    "model": arguments.route,
                    "prompt": arguments.prompt,
                    "max_tokens": arguments.max_tokens,
                },
                headers={"Accept-Language": language},
            )
            response.raise_for_status()
            body = response.json()  # its "model" names the adapter too
            print(f"{language} -> {body['model']}: {body['choices'][0]['text']}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
