"""Puts the gateway in front of an HTTP server, and says whether it is there.

Nothing here imports vLLM, so that `flag_values` can ask on a vLLM that the gateway does not fit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.activation import adapts_towers
from vllm_multilora.integration.server.settings.gateway_activation import is_enabled
from vllm_multilora.tenants.keys import UNGUARDED, has_keys

GATEWAY = "vllm_multilora.gateway.app.Gateway"
"""The class that vLLM's `--middleware` is given, by its name: nothing here imports it."""


_needed: set[str] = set()


def mount_gateway(args: argparse.Namespace) -> None:
    """Puts the gateway first among the middlewares in an HTTP server's arguments, once.

    vLLM calls the first one last. So the gateway is in front of all of vLLM, and behind the
    operator's own middlewares: paths and keys are checked as those have left them.

    Raises:
        ConfigError: The settings name keys, and the gateway does not act.
    """
    if settings_in(args) is None:
        if has_keys(_settings_given(args)):
            raise ConfigError(UNGUARDED)
        return
    if GATEWAY not in args.middleware:
        args.middleware = [GATEWAY, *args.middleware]


def require_no_blends(batch: str) -> None:
    """Stops a `vllm run-batch` with requests for blends: the base model alone would answer them.

    Args:
        batch: The file of requests; an address is not looked at.

    Raises:
        ConfigError: A request has the field.
    """
    if not Path(batch).is_file():
        return
    with Path(batch).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            may_blend = b"lora_blend" in line or rb"\u" in line
            if may_blend and "lora_blend" in json.loads(line).get("body", ()):
                raise ConfigError(
                    f"{batch}, line {number}: found `lora_blend`, which vllm run-batch does not "
                    f"know: expected an adapter of --lora-modules as the line's `model`"
                )


def need_gateway() -> None:
    """Requires the gateway in this process: without it, nothing would enforce the server's keys."""
    _needed.add(GATEWAY)


def is_gateway_missing() -> bool:
    """Whether this process needs the gateway, and its application was made without it.

    With several API servers vLLM reads each one's arguments before it loads its plugins, so nothing
    of ours has seen them there. vLLM imports each middleware when it makes its application.
    """
    return bool(_needed) and GATEWAY.rpartition(".")[0] not in sys.modules


def settings_in(args: argparse.Namespace) -> MultiLoRAConfig | None:
    """The settings in a server's arguments; None where the gateway does not act."""
    settings = _settings_given(args)
    serves_adapters = getattr(args, "enable_lora", False) and not adapts_towers(args)
    return settings if serves_adapters and is_enabled(settings) else None


def _settings_given(args: argparse.Namespace) -> MultiLoRAConfig:
    additional = getattr(args, "additional_config", None)
    return MultiLoRAConfig.from_additional_config(
        additional if isinstance(additional, Mapping) else None
    )
