"""The values of the plugin's flags: an HTTP server gets the gateway.

A server whose keys nothing would guard is refused at once: one without an engine, such as
`vllm launch render`, makes no configuration for `engine_config` to check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.decision import acts
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS
from vllm_multilora.integration.server.settings.gateway_activation import (
    mount_gateway,
    require_no_blends,
)
from vllm_multilora.integration.settings import flags
from vllm_multilora.integration.settings.start_errors import in_one_sentence
from vllm_multilora.tenants.keys import UNGUARDED, has_keys


@in_one_sentence
def from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    engine_args = flags.from_cli_args(original, cls, args)
    additional = engine_args.additional_config
    if isinstance(additional, dict):
        settings = MultiLoRAConfig.from_additional_config(additional)
        if has_keys(settings) and not acts(GATEWAY_SEAMS):
            raise ConfigError(UNGUARDED)
    if hasattr(args, "middleware"):
        mount_gateway(args)
    if (batch := getattr(args, "input_file", None)) is not None:
        require_no_blends(batch)
    return engine_args
