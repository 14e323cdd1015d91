"""The flag with a server's key, alike in all commands that ask a server."""

from __future__ import annotations

import argparse
import os


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """Adds `--api-key`."""
    parser.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        metavar="KEY",
        help="a key of the server, if it has any (default: $VLLM_API_KEY, which other users of "
        "this machine cannot see)",
    )
