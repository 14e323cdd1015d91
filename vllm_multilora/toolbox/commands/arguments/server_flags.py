"""The flags of `vllm serve` that say what a server would build; several commands take them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vllm_multilora.toolbox.commands.arguments.quiet import quieten_vllm

if TYPE_CHECKING:
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags


def add_arguments(parser: argparse.ArgumentParser, *, needs_model: bool) -> argparse._ArgumentGroup:
    """Adds the flags.

    Args:
        parser: The command's.
        needs_model: Whether `--model` must be given.

    Returns:
        Their group, for more of the server's flags.
    """
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


def server_of(arguments: argparse.Namespace, **more: Any) -> ServerFlags:
    """The server that the flags describe.

    Args:
        arguments: Those of `add_arguments`, and `max_lora_rank`.
        **more: Others of the server's settings.
    """
    quieten_vllm()
    from vllm_multilora.integration.offline.model_without_weights import ServerFlags

    modules = arguments.lora_target_modules
    return ServerFlags(
        arguments.model,
        max_lora_rank=arguments.max_lora_rank,
        lora_target_modules=None if modules is None else tuple(modules),
        dtype=arguments.dtype,
        lora_dtype=arguments.lora_dtype,
        trust_remote_code=arguments.trust_remote_code,
        dora=arguments.multilora_dora,
        **more,
    )
