"""`vllm-multilora status`: shows the adapters of a running server, once or repeatedly."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.toolbox.clients.adapter_servers import fetch
from vllm_multilora.toolbox.clients.http_client import base_url
from vllm_multilora.toolbox.commands.arguments.api_key import add_api_key
from vllm_multilora.toolbox.commands.output.status_table import screen, table

SHOWN = 0
_WATCH_S = 2.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "--url",
        default="http://localhost:8000",
        help="the server's address (default: %(default)s)",
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=_WATCH_S,
        metavar="SECONDS",
        help=f"refresh every SECONDS (default: {_WATCH_S:.0f}) until Ctrl-C",
    )
    add_api_key(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one line for each refresh")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns 0.

    Raises:
        MultiLoRAError: The server does not say.
    """
    if arguments.watch is not None and not 0 < arguments.watch < float("inf"):
        raise MultiLoRAError(f"--watch must be a positive number of seconds, got {arguments.watch}")
    url = base_url(arguments.url)
    _show(arguments, url)
    try:
        while arguments.watch is not None:
            time.sleep(arguments.watch)
            _show(arguments, url)
    except KeyboardInterrupt:
        pass  # the end of a watch
    return SHOWN


def _show(arguments: argparse.Namespace, url: str) -> None:
    listing = fetch(url, api_key=arguments.api_key)
    if arguments.json:
        print(json.dumps(listing), flush=True)
        return
    lines = table(listing, now=time.time())
    if arguments.watch is None or not sys.stdout.isatty():
        print("\n".join(lines), flush=True)
        return
    size = shutil.get_terminal_size()
    heading = f"{url}  {time.strftime('%H:%M:%S')}  (every {arguments.watch:g} s, Ctrl-C ends)"
    text = screen([heading, "", *lines], width=size.columns, height=size.lines)
    print(text, end="", flush=True)
