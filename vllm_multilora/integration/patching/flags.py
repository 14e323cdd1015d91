"""The plugin's flags on `vllm serve`, made from the fields of `MultiLoRAConfig`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm_multilora.config import CONFIG_KEY, MultiLoRAConfig, flag_of, given_settings
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.activation import adapts_towers, is_enabled
from vllm_multilora.integration.patching.ledger import missing
from vllm_multilora.integration.patching.version import SUPPORTED_TEXT
from vllm_multilora.tenants.keys import ADMIN_KEY_VARIABLE

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

GATEWAY = "vllm_multilora.gateway.app.Gateway"
"""The class that vLLM's `--middleware` is given, by its name: nothing here imports it."""

UNGUARDED = (
    f"--multilora-tenants, --multilora-admin-key-file and {ADMIN_KEY_VARIABLE} protect nothing "
    f"here, because vllm-multilora is not active: it needs --enable-lora without "
    f"--enable-tower-connector-lora, a supported vLLM and vLLM's Python front end. Provide these, "
    f"or leave all three out"
)
"""Why a server with keys does not start."""

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

    An HTTP server's arguments also get the gateway; see `mount_gateway`.

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
    if hasattr(args, "middleware"):
        mount_gateway(args)


def mount_gateway(args: argparse.Namespace) -> None:
    """Puts the gateway first among the middlewares in an HTTP server's arguments, once.

    vLLM calls the first one last. So the gateway is in front of all of vLLM, and behind the
    operator's own middlewares: paths and keys are checked as those have left them.

    Raises:
        ConfigError: The settings name keys, and the plugin is not active.
    """
    if settings_in(args) is None:
        if has_keys(settings_given(args)):
            raise ConfigError(UNGUARDED)
        return
    if GATEWAY not in args.middleware:
        args.middleware = [GATEWAY, *args.middleware]


def is_gateway_mounted() -> bool:
    """Whether vLLM has made an application with the gateway in this process.

    With several API servers vLLM reads each one's arguments before it loads its plugins, so nothing
    of ours has seen them there. vLLM imports each middleware when it makes its application.
    """
    return GATEWAY.rpartition(".")[0] in sys.modules


def settings_in(args: argparse.Namespace) -> MultiLoRAConfig | None:
    """The settings in a server's arguments; None where the plugin does not act."""
    settings = settings_given(args)
    serves_adapters = getattr(args, "enable_lora", False) and not adapts_towers(args)
    return settings if serves_adapters and is_enabled(settings) else None


def settings_given(args: argparse.Namespace) -> MultiLoRAConfig:
    """The settings in a server's arguments, whether the plugin acts or not."""
    additional = getattr(args, "additional_config", None)
    return MultiLoRAConfig.from_additional_config(
        additional if isinstance(additional, Mapping) else None
    )


def has_keys(settings: MultiLoRAConfig) -> bool:
    """Whether the settings name keys of operators or of tenants."""
    return settings.tenants is not None or settings.admin_key_file is not None


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
    if not missing(("flag-values", "settings-check")):
        add_flags(parser)
    return parser


def from_cli_args(original: Callable[..., Any], cls: type, args: Any) -> Any:
    engine_args = original(cls, args)
    merge_flags(args, engine_args)
    if _own_settings(engine_args.additional_config) and missing(("settings-check",)):
        raise ConfigError(
            f"the settings of {CONFIG_KEY} in --additional-config cannot be checked with this "
            f"vLLM: leave them out, or install vLLM {SUPPORTED_TEXT}"
        )
    return engine_args
