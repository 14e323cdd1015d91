"""`vllm-multilora completion`: completion scripts for shells."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
        0, or 2 if shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        print(
            "vllm-multilora completion: error: shtab is not installed: "
            "pip install 'vllm-multilora[completion]'",
            file=sys.stderr,
        )
        return 2
    print(shtab.complete(arguments.program, shell=arguments.shell))
    return 0
