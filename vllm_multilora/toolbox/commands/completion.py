"""`vllm-multilora completion`: completion scripts for shells."""

from __future__ import annotations

import argparse

from vllm_multilora.errors import MultiLoRAError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def run(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        raise MultiLoRAError(
            "shtab is not installed: pip install 'vllm-multilora[completion]'"
        ) from None
    print(shtab.complete(arguments.program, shell=arguments.shell))
    return 0
