"""`vllm-multilora completion`: completion scripts for shells."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(arguments: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(arguments.program, shell=arguments.shell))
    return 0
