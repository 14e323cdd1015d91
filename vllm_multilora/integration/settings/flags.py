"""The plugin's flags on `vllm serve`, made from the fields of `MultiLoRAConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm_multilora.config import CONFIG_KEY, MultiLoRAConfig, flag_of, given_settings
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.parts import CORE
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs


_CHECKS = ("allowed_roots", "require_digest", "signing_keys")
"""Settings that say which adapters may be served."""


def checks_in(settings: MultiLoRAConfig) -> str:
    """The flags that say which adapters may be served; empty where none of them is given."""
    return " and ".join(flag_of(name) for name in _CHECKS if getattr(settings, name))


def _destination(name: str) -> str:
    return f"{CONFIG_KEY}_{name}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per setting; a flag that is not given leaves no trace in the arguments."""
    group = parser.add_argument_group(
        "vllm-multilora", "Multi-tenant LoRA serving (plugin vllm-multilora)."
    )
    for setting in fields(MultiLoRAConfig):
        options = dict(setting.metadata["options"])
        if not options.keys() - {"help"}:
            options["action"] = argparse.BooleanOptionalAction
        group.add_argument(
            flag_of(setting.name), dest=_destination(setting.name), default=None, **options
        )


def merge_flags(args: argparse.Namespace, engine_args: EngineArgs) -> None:
    """Moves the flags that were given into `additional_config`, over what is there already.

    The arguments' own is changed too: with several API servers vLLM sends the arguments to each,
    which reads them before it has loaded its plugins.

    Raises:
        ConfigError: Keys are to guard a server that knows none, or what is there is no mapping.
    """
    given = {
        setting.name: value
        for setting in fields(MultiLoRAConfig)
        if (value := getattr(args, _destination(setting.name), None)) is not None
    }
    own = _own_settings(engine_args.additional_config)
    if given:
        additional = dict(engine_args.additional_config or {})
        additional[CONFIG_KEY] = own = {**own, **given}
        engine_args.additional_config = args.additional_config = additional
    if _serves_grpc(args) and {"tenants", "admin_key_file"} & {*own}:
        raise ConfigError(
            "--multilora-tenants and --multilora-admin-key-file protect HTTP servers, and this is "
            "vLLM's gRPC server (--grpc): serve HTTP, or leave these flags out"
        )


def _serves_grpc(args: argparse.Namespace) -> bool:
    """Whether the arguments are those of vLLM's gRPC server, started by `vllm serve` or itself."""
    is_itself = hasattr(args, "host") and not hasattr(args, "lora_modules")
    return is_itself or getattr(args, "grpc", False)


def _own_settings(additional_config: Any) -> Mapping[str, Any]:
    # A platform's own object has none.
    return given_settings(additional_config) if isinstance(additional_config, dict) else {}


def add_cli_args(original: Callable[..., Any], parser: Any) -> Any:
    parser = original(parser)
    # A flag that nobody reads would promise something: without it vLLM refuses it.
    if not CORE_SEAMS.missing(("flag-values", "settings-check")):
        add_flags(parser)
    return parser


def from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    engine_args = original(cls, args)
    merge_flags(args, engine_args)
    if _own_settings(engine_args.additional_config) and CORE_SEAMS.missing(("settings-check",)):
        raise ConfigError(
            f"the settings of {CONFIG_KEY} in --additional-config cannot be checked with this "
            f"vLLM: leave them out, or install vLLM {CORE.tested}"
        )
    return engine_args
