"""The settings, one frozen dataclass.

Every field is a flag of `vllm serve` and a key of `additional_config["multilora"]`, so that
`LLM(..., additional_config={"multilora": {"backend": "torch"}})` and
`vllm serve ... --multilora-backend torch` mean the same. `integration/flags.py` derives the
flags from the fields' metadata, so a field added here needs no second place.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_multilora.errors import ConfigError

CONFIG_KEY = "multilora"
"""The key of vLLM's `additional_config` under which the settings travel."""

BACKENDS = ("auto", "native", "torch", "vllm")


@dataclass(frozen=True)
class MultiLoRAConfig:
    """Settings of the plugin.

    Attributes:
        enabled: True or False switch the plugin on or off. None, the default, is on with the
            vLLM versions that the plugin supports and off, with a message, with others.
        backend: What computes the adapters' products. `native`: C kernels on CPUs; `torch`:
            plain PyTorch; `vllm`: vLLM's own, for comparison; `auto`: the best for the
            platform.
    """

    enabled: bool | None = field(
        default=None,
        metadata={
            "flag": "--multilora",
            "help": "Use vllm-multilora for LoRA. On by default with supported vLLM versions; "
            "--multilora forces it on with others, --no-multilora leaves vLLM as it is.",
        },
    )
    backend: str = field(
        default="auto",
        metadata={
            "flag": "--multilora-backend",
            "choices": BACKENDS,
            "help": "What computes the adapters' products: native (C kernels, CPU), torch (plain "
            "PyTorch), vllm (stock, for comparison), or auto (the best for the platform).",
        },
    )

    def __post_init__(self) -> None:
        if self.enabled is not None and not isinstance(self.enabled, bool):
            raise ConfigError(
                f"{CONFIG_KEY}.enabled must be true, false or null, got {self.enabled!r}"
            )
        if self.backend not in BACKENDS:
            raise ConfigError(
                f"{CONFIG_KEY}.backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}"
            )

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> MultiLoRAConfig:
        """The settings in vLLM's `additional_config`; defaults where there are none.

        Raises:
            ConfigError: `multilora` is no mapping, or a key or value in it is wrong.
        """
        settings = (additional_config or {}).get(CONFIG_KEY, {})
        if not isinstance(settings, Mapping):
            raise ConfigError(
                f'additional_config["{CONFIG_KEY}"] must be a mapping of settings such as '
                f'{{"backend": "auto"}}, got {settings!r}'
            )
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"unknown setting {key!r} in {CONFIG_KEY}{hint} (known: {', '.join(known)})"
                )
        return cls(**settings)
