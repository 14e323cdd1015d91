"""`vllm-multilora digest`: prints adapters' digests, as a server would compute them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from vllm_multilora.errors import ConfigError

DONE, FAILED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="DIR", help="an adapter's folder")
    parser.add_argument(
        *("--multilora-allow-pickle", "--allow-pickle"),
        action="store_true",
        help="also read adapter_model.bin and .pt, as the server does with this flag",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object that maps folder names to digests, as "
        "--multilora-require-digest reads it",
    )


def run(arguments: argparse.Namespace) -> int:
    from vllm_multilora.adapters.adapter_errors import AdapterError
    from vllm_multilora.adapters.intake import Rules, open_adapter

    # Servers name an adapter as its folder is called, wherever a link of that name leads.
    names = [Path(path).name for path in map(os.path.abspath, arguments.adapters)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if arguments.json and twice:
        raise ConfigError(
            f"found several folders named {', '.join(twice)}, expected different names: --json "
            "has one digest for each"
        )
    rules = Rules(allow_pickle=arguments.multilora_allow_pickle)
    found: dict[str, str] = {}
    status = DONE
    for name, folder in zip(names, arguments.adapters, strict=True):
        try:
            with open_adapter(folder, rules) as source:
                found[name] = source.digest()
        except AdapterError as error:
            status = FAILED
            print(f"{folder}: {error}", file=sys.stderr)
            continue
        if not arguments.json:
            print(f"{found[name]}  {folder}")
    if arguments.json:
        print(json.dumps(found, indent=2))
    return status
