"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import fields
from typing import TYPE_CHECKING

from vllm_multilora.errors import MultiLoRAError

if TYPE_CHECKING:
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags


def add_api_key(parser: argparse.ArgumentParser) -> None:
    """Adds `--api-key`."""
    parser.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        metavar="KEY",
        help="a key of the server, if it has any (default: $VLLM_API_KEY, which other users of "
        "this machine cannot see)",
    )


def add_server(parser: argparse.ArgumentParser, more: str = "") -> None:
    """Adds `--url`, with more to say of it, and `--api-key`."""
    parser.add_argument(
        "--url",
        default="http://localhost:8000",
        help=f"the server's address (default: %(default)s){more}",
    )
    add_api_key(parser)


def require_seconds(flag: str, seconds: float | None) -> None:
    """Raises a MultiLoRAError if a flag is given, and is no number of seconds."""
    if seconds is not None and not 0 < seconds < float("inf"):
        raise MultiLoRAError(f"{flag} must be a positive number of seconds, got {seconds}")


def add_server_flags(
    parser: argparse.ArgumentParser, *, needs_model: bool
) -> argparse._ArgumentGroup:
    """Adds the flags of `vllm serve` that say what a server would build; returns their group."""
    group = parser.add_argument_group("server (as for vllm serve)")
    group.add_argument(
        "--model",
        required=needs_model,
        help="the base model's folder or name, or a config.json; no weights are read",
    )
    group.add_argument(
        "--lora-target-modules",
        nargs="+",
        metavar="MODULE",
        help="layers that get slots; adapters of none of them are refused (default: all that the "
        "base model supports)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16", "float32"),
        help="the base model's type (default: %(default)s)",
    )
    group.add_argument(
        "--lora-dtype",
        default="auto",
        choices=("auto", "float16", "bfloat16"),
        help="the slots' type, in which adapters must not overflow (default: the base model's)",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the base model"
    )
    group.add_argument("--multilora-dora", action="store_true", help="serve DoRA adapters, too")
    return group


def server_of(arguments: argparse.Namespace) -> ServerFlags:
    """The server that the flags of `add_server_flags`, and others that a command has, describe.

    It has one slot, whatever `--max-loras` is: no more are needed to find out what a slot is.
    """
    _quieten_vllm()
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags

    names = {field.name for field in fields(ServerFlags)} - {"max_loras"}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    return ServerFlags(dora=arguments.multilora_dora, **given)


def _quieten_vllm() -> None:
    """Called before vLLM is imported: it logs to standard output, where tables and JSON belong."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Warns of every try, where vLLM's error tells of all of them.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Warns that Triton is of no use on CPUs, before vLLM's logging is set up.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
