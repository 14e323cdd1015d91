"""`vllm-multilora status`: shows the adapters of a running server, once or repeatedly."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from contextlib import suppress
from typing import Any

from vllm_multilora.toolbox.advice.snapshots import scrape
from vllm_multilora.toolbox.advice.watching import rates
from vllm_multilora.toolbox.clients.adapter_servers import fetch
from vllm_multilora.toolbox.clients.http_client import UnreachableError, base_url
from vllm_multilora.toolbox.commands.output.status_table import screen, table
from vllm_multilora.toolbox.commands.shared_arguments import add_server, require_seconds

_WATCH_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=_WATCH_S,
        metavar="SECONDS",
        help=f"refresh every SECONDS (default: {_WATCH_S:.0f}) until Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each refresh")


def run(arguments: argparse.Namespace) -> int:
    require_seconds("--watch", arguments.watch)
    url, before = base_url(arguments.url), None
    try:
        while True:
            listing, now = fetch(url, api_key=arguments.api_key), None
            if arguments.watch is not None:
                with suppress(UnreachableError):  # metrics are not for tenants
                    now = scrape(url, api_key=arguments.api_key)
            listing |= {"rates": rates(before, now)} if now and before else {}
            _show(arguments, url, listing)
            if arguments.watch is None:
                return 0
            before = now
            time.sleep(arguments.watch)
    except KeyboardInterrupt:
        return 0  # the end of a watch


def _show(arguments: argparse.Namespace, url: str, listing: dict[str, Any]) -> None:
    lines = [json.dumps(listing)] if arguments.json else table(listing, now=time.time())
    if arguments.json or arguments.watch is None or not sys.stdout.isatty():
        print("\n".join(lines), flush=True)
        return
    size = shutil.get_terminal_size()
    heading = f"{url}  {time.strftime('%H:%M:%S')}  (every {arguments.watch:g} s, Ctrl-C ends)"
    text = screen([heading, "", *lines], width=size.columns, height=size.lines)
    print(text, end="", flush=True)
