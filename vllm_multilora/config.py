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

BACKENDS = ("auto", "native", "torch", "triton", "vllm")

_LISTS = {"pin": "adapter names", "allowed_roots": "folders", "adapter_dir": "folders"}

_NOT_INVARIANT = {
    "torch": "plain PyTorch's sums depend on the batch",
    "vllm": "for vLLM's own kernels set VLLM_BATCH_INVARIANT=1 instead",
}


@dataclass(frozen=True)
class MultiLoRAConfig:
    """Settings of the plugin.

    Attributes:
        enabled: True or False switch the plugin on or off. None, the default, is on with the
            vLLM versions that the plugin supports and off, with a message, with others.
        backend: What computes the adapters' products. `native`: C kernels on CPUs; `triton`:
            Triton kernels on NVIDIA and AMD GPUs; `torch`: plain PyTorch; `vllm`: vLLM's own,
            for comparison; `auto`: the best for the platform.
        batch_invariant: Whether an adapter's product for a token must have the same bits in any
            batch. vLLM's own VLLM_BATCH_INVARIANT=1, which does the same for the base model,
            switches it on as well.
        cache_policy: Which adapter gives up its place: `lru`, `lfu`, `slru`, `gdsf`, one that an
            installed package offers, or `module:Class`.
        cpu_cache_gib: GiB of host memory for adapters, shared by the engine's workers on a
            machine. None: no limit in bytes where `--max-cpu-loras` is given, else 10 % of the
            machine's memory.
        async_loading: Whether adapters are loaded in the background, while other requests go on.
        loader_threads: Threads that load, in each worker.
        load_timeout_s: Seconds after which a load is given up and its requests fail.
        unload_timeout_s: Seconds that an unloaded adapter's running requests have to end.
        allowed_roots: Folders below which adapters must lie; anywhere where there are none.
        adapter_dir: Directories of which a server serves every sub-folder with an adapter under the
            folder's name, from its first use on.
        allow_pickle: Whether adapters in `adapter_model.bin` or `.pt` are read too, with
            PyTorch's restricted unpickler.
        check_finite: Whether NaN and infinity in an adapter's weights are looked for.
        routes: File of routes: public model names that lead to adapters by share or by what the
            request says. Only for HTTP servers.
        metrics_max_adapters: Most adapters whose names are values of the label `lora_name` in
            metrics; all others are counted together as `__other__`.
        pin: Names of adapters that keep their slot once they have one; fewer than there are
            slots.
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
            "help": "What computes the adapters' products: native (C kernels, CPU), triton (NVIDIA "
            "and AMD GPUs), torch (plain PyTorch), vllm (stock, for comparison), or auto (the best "
            "for the platform).",
        },
    )
    batch_invariant: bool = field(
        default=False,
        metadata={
            "flag": "--multilora-batch-invariant",
            "help": "Give an adapter's product for a token the same bits in any batch, at some "
            "speed on GPUs. VLLM_BATCH_INVARIANT=1 does the same for the base model, and includes "
            "this.",
        },
    )
    cache_policy: str = field(
        default="lru",
        metadata={
            "flag": "--multilora-cache-policy",
            "metavar": "NAME",
            "help": "Which adapter gives up its place when room is needed: lru, lfu, slru, gdsf, a "
            "policy of an installed package, or module:Class.",
        },
    )
    cpu_cache_gib: float | None = field(
        default=None,
        metadata={
            "flag": "--multilora-cpu-cache-gib",
            "metavar": "GIB",
            "type": float,
            "help": "Host memory for adapters in GiB, shared by the engine's workers on a machine. "
            "Without it, --max-cpu-loras is the only limit; without either, 10 %% of the machine's "
            "memory.",
        },
    )
    async_loading: bool = field(
        default=True,
        metadata={
            "flag": "--multilora-async-loading",
            "help": "Load adapters in the background, while other requests go on (the default); "
            "--no-multilora-async-loading makes the engine wait, as vLLM does.",
        },
    )
    loader_threads: int = field(
        default=2,
        metadata={
            "flag": "--multilora-loader-threads",
            "metavar": "N",
            "type": int,
            "help": "Threads that load adapters, in each worker.",
        },
    )
    load_timeout_s: float = field(
        default=60.0,
        metadata={
            "flag": "--multilora-load-timeout-s",
            "metavar": "SECONDS",
            "type": float,
            "help": "Seconds after which a load is given up and its requests fail.",
        },
    )
    unload_timeout_s: float = field(
        default=60.0,
        metadata={
            "flag": "--multilora-unload-timeout-s",
            "metavar": "SECONDS",
            "type": float,
            "help": "Seconds that an unloaded adapter's running requests have to end; then they "
            "are ended.",
        },
    )
    allowed_roots: tuple[str, ...] = field(
        default=(),
        metadata={
            "flag": "--multilora-allowed-roots",
            "metavar": "DIR",
            "action": "append",
            "help": "Adapters load only from below this folder, links resolved; may be given "
            "several times. Without it, from anywhere.",
        },
    )
    adapter_dir: tuple[str, ...] = field(
        default=(),
        metadata={
            "flag": "--multilora-adapter-dir",
            "metavar": "DIR",
            "action": "append",
            "help": "Serve every sub-folder with an adapter under the folder's name, from its "
            "first use on; new, changed and removed ones are noticed. May be given several times.",
        },
    )
    allow_pickle: bool = field(
        default=False,
        metadata={
            "flag": "--multilora-allow-pickle",
            "help": "Read adapter_model.bin and .pt too, with PyTorch's restricted unpickler.",
        },
    )
    check_finite: bool = field(
        default=True,
        metadata={
            "flag": "--multilora-check-finite",
            "help": "Refuse adapters with NaN or infinity in their weights (the default).",
        },
    )
    routes: str | None = field(
        default=None,
        metadata={
            "flag": "--multilora-routes",
            "metavar": "FILE",
            "help": "YAML or JSON file of routes: public model names that lead to adapters by "
            "share, by language or by whatever the request says, with fallbacks. Read again when "
            "it changes. Only for servers: LLM() names adapters itself.",
        },
    )
    metrics_max_adapters: int = field(
        default=200,
        metadata={
            "flag": "--multilora-metrics-max-adapters",
            "metavar": "N",
            "type": int,
            "help": "Adapters with series of their own in the LoRA metrics; the others are counted "
            'together as lora_name="__other__".',
        },
    )
    pin: tuple[str, ...] = field(
        default=(),
        metadata={
            "flag": "--multilora-pin",
            "metavar": "NAME",
            "action": "append",
            "help": "An adapter that keeps its slot once it has one; may be given several times, "
            "for fewer adapters than --max-loras.",
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
        if not isinstance(self.batch_invariant, bool):
            raise ConfigError(
                f"{CONFIG_KEY}.batch_invariant must be true or false, got {self.batch_invariant!r}"
            )
        if self.batch_invariant and self.backend in _NOT_INVARIANT:
            raise ConfigError(
                f"{CONFIG_KEY}.batch_invariant does not go with the backend {self.backend!r}: "
                f"{_NOT_INVARIANT[self.backend]}. Choose the backend 'auto', 'native' or 'triton', "
                f"or leave batch_invariant out"
            )
        if not isinstance(self.cache_policy, str) or not self.cache_policy:
            raise ConfigError(
                f"{CONFIG_KEY}.cache_policy must be the name of a policy, got {self.cache_policy!r}"
            )
        gib = self.cpu_cache_gib
        if gib is not None and (
            isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 < gib < float("inf")
        ):
            raise ConfigError(f"{CONFIG_KEY}.cpu_cache_gib must be a positive number, got {gib!r}")
        for name in ("async_loading", "allow_pickle", "check_finite"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{CONFIG_KEY}.{name} must be true or false, got {value!r}")
        threads = self.loader_threads
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 64:
            raise ConfigError(
                f"{CONFIG_KEY}.loader_threads must be a whole number from 1 to 64, got {threads!r}"
            )
        most = self.metrics_max_adapters
        if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= 100_000:
            raise ConfigError(
                f"{CONFIG_KEY}.metrics_max_adapters must be a whole number from 0 to 100000, got "
                f"{most!r}"
            )
        for name in ("load_timeout_s", "unload_timeout_s"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not 0 < value <= 86_400:
                raise ConfigError(
                    f"{CONFIG_KEY}.{name} must be a number of seconds above 0 and at most a day, "
                    f"got {value!r}"
                )
        if self.routes is not None and (not isinstance(self.routes, str) or not self.routes):
            raise ConfigError(
                f"{CONFIG_KEY}.routes must be the path of a file, got {self.routes!r}"
            )
        for name, what in _LISTS.items():
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(
                isinstance(value, str) and value for value in values
            ):
                raise ConfigError(f"{CONFIG_KEY}.{name} must be a list of {what}, got {values!r}")
            # JSON has lists only; the settings are hashable.
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))

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
