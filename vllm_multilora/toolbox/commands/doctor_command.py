"""`vllm-multilora doctor`: shows what is installed, and what would run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        type=Path,
        metavar="WHEEL-OR-DIR",
        help="check a vLLM that is not installed, given as a wheel or a folder with its package: "
        "is everything that the plugin patches or uses the same as in the versions it supports? "
        "Nothing of it is imported. Exits with 1 if something differs, with 2 if there is no vLLM",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.against is not None:
        from vllm_multilora.integration.offline.against import judge

        return judge(arguments.against)
    from vllm_multilora.integration.offline.installation import diagnose

    return diagnose()
