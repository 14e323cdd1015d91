"""Whether the gateway acts for an engine; puts it in front of an HTTP server.

Nothing here imports vLLM, so that `flag_values` can ask on a vLLM that the gateway does not fit.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_multilora.adapters.blend import BLEND_FIELD
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.patching.activation import (
    adapts_towers,
    as_flags,
    given_to,
    loads_adapters,
    settings_of,
)
from vllm_multilora.integration.patching.activation import is_active as is_core_active
from vllm_multilora.integration.patching.decision import acts, said_of
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS
from vllm_multilora.integration.patching.version import installed_version
from vllm_multilora.tenants.keys import UNGUARDED, has_keys

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

GATEWAY = "vllm_multilora.gateway.app.Gateway"
"""The class that vLLM's `--middleware` is given, by its name: nothing here imports it."""

_ITS_SETTINGS = frozenset({"adapter_dir", "adapter_chat_templates", "routes", "usage_log"})
"""Settings that mean nothing without the gateway; keys and tenants stop the start there."""

TRUSTS_CLIENTS: Attached[bool] = Attached("trusts-clients-templates")
"""By an HTTP server's arguments, whether they say `--trust-request-chat-template`."""


def mount_gateway(args: argparse.Namespace) -> None:
    """Puts the gateway first among the middlewares in an HTTP server's arguments, once.

    vLLM calls the first one last. So the gateway is in front of all of vLLM, and behind the
    operator's own middlewares: paths and keys are checked as those have left them.

    Raises:
        ConfigError: The settings name keys, and the gateway does not act.
    """
    if (settings := settings_in(args)) is None:
        if has_keys(_settings_given(args)):
            raise ConfigError(UNGUARDED)
        return
    if GATEWAY not in args.middleware:
        args.middleware = [GATEWAY, *args.middleware]
        TRUSTS_CLIENTS.set(args, args.trust_request_chat_template)
        if settings.adapter_chat_templates is not None:  # then the gateway refuses clients' own
            args.trust_request_chat_template = True


def require_no_blends(batch: str) -> None:
    """Stops a `vllm run-batch` with requests for blends: the base model alone would answer them.

    Raises:
        ConfigError: A request in the file has the field; an address is not looked at.
    """
    if not Path(batch).is_file():
        return
    with Path(batch).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if (BLEND_FIELD.encode() in line or rb"\u" in line) and _asks_for_blend(line):
                raise ConfigError(
                    f"{batch}, line {number}: found `{BLEND_FIELD}`, which vllm run-batch does not "
                    f"know: expected an adapter of --lora-modules as the line's `model`"
                )


def _asks_for_blend(line: bytes) -> bool:
    try:
        body = json.loads(line)["body"]
    except (ValueError, LookupError, TypeError, RecursionError):  # vLLM refuses the line
        return False
    return isinstance(body, dict) and BLEND_FIELD in body


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


def is_enabled(settings: MultiLoRAConfig) -> bool:
    """Whether the gateway is on: not switched off, and the installed vLLM has its seams.

    `--multilora` forces LoRA serving alone: what guards keys and tenants is whole, or off.
    """
    return settings.enabled is not False and acts(GATEWAY_SEAMS)


def is_active(vllm_config: VllmConfig) -> bool:
    """Whether the gateway acts for this engine: it is on, LoRA is on, and not for towers."""
    lora = vllm_config.lora_config
    return lora is not None and not adapts_towers(lora) and is_enabled(settings_of(vllm_config))


def announce(vllm_config: VllmConfig) -> None:
    """Logs, once, why the gateway is off for a new engine with LoRA."""
    settings, lora = settings_of(vllm_config), vllm_config.lora_config
    if lora is None or adapts_towers(lora):
        return
    if settings.enabled is False or is_active(vllm_config):
        return
    if is_core_active(vllm_config) or GATEWAY_SEAMS.part.is_newer(installed_version()):
        logger.warning("%s.", said_of(GATEWAY_SEAMS))
    if idle := idle_flags(vllm_config):
        logger.warning("These flags have no effect without the gateway: %s.", idle)


def idle_flags(vllm_config: VllmConfig) -> str:
    """The flags that were given and mean nothing without an HTTP server and the gateway."""
    given = given_to(vllm_config).items()
    return as_flags({name: value for name, value in given if value and name in _ITS_SETTINGS})


def is_active_behind(client: Any) -> bool:
    """Whether the gateway acts for the engine behind a client of vLLM's.

    A server that only renders prompts has no engine, and its client no configuration of one.
    """
    vllm_config = getattr(client, "vllm_config", None)
    return vllm_config is not None and is_active(vllm_config)


def manages_adapters(vllm_config: VllmConfig) -> bool:
    """Whether the gateway acts for this engine, and the plugin loads its adapters."""
    return is_active(vllm_config) and loads_adapters(vllm_config)
