"""The settings, one frozen dataclass.

Every field is a flag of `vllm serve` and a key of `additional_config["multilora"]`, so that
`LLM(..., additional_config={"multilora": {"backend": "torch"}})` and
`vllm serve ... --multilora-backend torch` mean the same. `integration/patching/flags.py`
derives the flags from the fields' metadata, so a field added here needs no second place.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vllm_multilora.errors import ConfigError

CONFIG_KEY = "multilora"
"""The key of vLLM's `additional_config` under which the settings travel."""

STORES = ("process", "thread")
BACKENDS = ("auto", "native", "torch", "triton", "vllm")

_LISTS = {"pin": "adapter names", "allowed_roots": "folders", "adapter_dir": "folders"}

_FILES = (
    "routes",
    "admin_key_file",
    "tenants",
    "usage_log",
    "require_digest",
    "signing_keys",
)

_SWITCHES = (
    "async_loading",
    "allow_pickle",
    "allow_hub",
    "check_finite",
    "quarantine",
    "fair_shares",
    "dora",
    "latency_metrics",
    "status_page",
)

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
        cpu_cache_gib: GiB of host memory for adapters on the machine, where all servers of this
            user share one copy of each; the largest that any of them asks for counts. None: no
            limit in bytes where `--max-cpu-loras` is given, else 10 % of the machine's memory.
        async_loading: Whether adapters are loaded in the background, while other requests go on.
        store: Where the store runs that reads adapters and keeps them in host memory. `process`:
            one for all servers of this user on the machine, its checks sandboxed; `thread`: in
            the engine's own process, where no process may be started.
        loader_threads: Adapters that are read at once on the machine; those that take long do not
            count.
        load_timeout_s: Seconds after which a load is given up and its requests fail.
        unload_timeout_s: Seconds that an unloaded adapter's running requests have to end.
        allowed_roots: Folders below which adapters must lie; anywhere where there are none.
        adapter_dir: Directories of which a server serves every sub-folder with an adapter under the
            folder's name, from its first use on.
        allow_pickle: Whether adapters in `adapter_model.bin` or `.pt` are read too, with
            PyTorch's restricted unpickler.
        allow_hub: Whether the Hugging Face hub is asked for an adapter whose path is no folder.
        check_finite: Whether NaN and infinity in an adapter's weights are looked for.
        quarantine: Whether an adapter whose numbers are not finite in use is taken out of service,
            and blocks of the KV cache are emptied before they are used again.
        dora: Whether DoRA adapters are served. Slots have room for what they multiply outputs by,
            4 bytes for each output of each layer, and the kernels do so.
        fair_shares: Whether tenants (adapters, where a request is no tenant's) have equal shares of
            the engine, or shares by their weights, while several have requests.
        fair_slowdown: How many times as long a step may take because of those who have had much
            more of late than another that takes part in it.
        routes: File of routes: public model names that lead to adapters by share or by what the
            request says. Only for HTTP servers.
        admin_key_file: File with the keys of operators, who alone may load and unload adapters and
            see folders then. None: the variable MULTILORA_ADMIN_KEY, or no such keys.
        tenants: File of tenants: which key is whose, and what each tenant may use. Only for HTTP
            servers.
        require_digest: File of the digests that adapters must have to be served.
        signing_keys: File of public keys and certificates, by one of which adapters must be signed
            to be served.
        usage_log: File that gets a line of JSON for each prompt, with its tokens. Only for HTTP
            servers.
        usage_log_mib: MiB at which that file is renamed, and a new one begun.
        latency_metrics: Whether there are histograms of each adapter's latencies.
        metrics_max_adapters: Most adapters whose names are values of the label `lora_name` in
            metrics; all others are counted together as `__other__`.
        status_page: Whether a server has the page `/multilora`, which shows its adapters.
        max_blends: Most different blends of adapters in use at a time, for each tenant, and for all
            requests of no tenant together; 0: none.
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
            "help": "Host memory for adapters in GiB: one copy of each for all servers of this "
            "user on the machine, and the largest budget that any of them asks for counts. Without "
            "it, --max-cpu-loras is the only limit; without either, 10 %% of the machine's memory.",
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
    store: str = field(
        default="process",
        metadata={
            "flag": "--multilora-store",
            "choices": STORES,
            "help": "Where adapters are read, checked and kept in host memory: in a process that "
            "all servers of this user on the machine share, its checks sandboxed (process, the "
            "default), or on a thread of each engine, without a sandbox (thread).",
        },
    )
    loader_threads: int = field(
        default=2,
        metadata={
            "flag": "--multilora-loader-threads",
            "metavar": "N",
            "type": int,
            "help": "Adapters that are read at once on this machine; those that take long do not "
            "count.",
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
    allow_hub: bool = field(
        default=False,
        metadata={
            "flag": "--multilora-allow-hub",
            "help": "Download an adapter from the Hugging Face hub where its path is no folder, "
            "as vLLM does; the time counts towards its load's limit.",
        },
    )
    check_finite: bool = field(
        default=True,
        metadata={
            "flag": "--multilora-check-finite",
            "help": "Refuse adapters with NaN or infinity in their weights (the default).",
        },
    )
    quarantine: bool = field(
        default=True,
        metadata={
            "flag": "--multilora-quarantine",
            "help": "Take an adapter out of service whose numbers are not finite in use, and empty "
            "blocks of the KV cache before they are used again, so that nobody reads what it has "
            "left there (the default).",
        },
    )
    dora: bool = field(
        default=False,
        metadata={
            "flag": "--multilora-dora",
            "help": "Serve DoRA adapters (PEFT's use_dora) too. Slots get larger by 4 bytes for "
            "each output of each layer; vllm-multilora plan says how much that is.",
        },
    )
    fair_shares: bool = field(
        default=False,
        metadata={
            "flag": "--multilora-fair-shares",
            "help": "While several tenants (adapters, where a request is no tenant's) have "
            "requests, give each of them the same share of tokens, places and slots, or shares by "
            "weight. Without it requests are served in the order in which they come, as by vLLM "
            "(the default); with --scheduling-policy priority too.",
        },
    )
    fair_slowdown: float = field(
        default=1.5,
        metadata={
            "flag": "--multilora-fair-slowdown",
            "metavar": "RATIO",
            "type": float,
            "help": "With fair shares, how many times as long a step may take because of the "
            "tokens of those who have had much more of late than another that takes part in it. "
            "They have as many of a step as it takes, by measured times. The lower, the less the "
            "others' tokens wait for theirs, and the longer their own requests take.",
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
    admin_key_file: str | None = field(
        default=None,
        metadata={
            "flag": "--multilora-admin-key-file",
            "metavar": "FILE",
            "help": "File with the operators' keys, one in each line: only they may load and "
            "unload adapters, and only they are told folders. Without it MULTILORA_ADMIN_KEY "
            "counts; without either, the API key is the operator's.",
        },
    )
    tenants: str | None = field(
        default=None,
        metadata={
            "flag": "--multilora-tenants",
            "metavar": "FILE",
            "help": "YAML or JSON file of tenants: which key is whose, the adapters and routes "
            "that each may use and see, weights and limits. Read again when it changes. Only for "
            "servers.",
        },
    )
    require_digest: str | None = field(
        default=None,
        metadata={
            "flag": "--multilora-require-digest",
            "metavar": "FILE",
            "help": "Serve adapters only with the digests that this file has for their names: a "
            'JSON object, as vllm-multilora digest --json prints it; "*": "any" lets all others '
            "be. Read again when it changes.",
        },
    )
    signing_keys: str | None = field(
        default=None,
        metadata={
            "flag": "--multilora-signing-keys",
            "metavar": "FILE",
            "help": "Serve only adapters that are signed (OpenSSF model signing, model.sig in the "
            "adapter's folder) by one of the public keys or certificates in this PEM file, and are "
            "as they were signed. Read again for each adapter that is loaded. Needs "
            "vllm-multilora[signing].",
        },
    )
    usage_log: str | None = field(
        default=None,
        metadata={
            "flag": "--multilora-usage-log",
            "metavar": "FILE",
            "help": "Append a line of JSON to this file for each prompt that was answered or given "
            "up: time, tenant, route, adapter, version, tokens, status. Only for servers.",
        },
    )
    usage_log_mib: float = field(
        default=256.0,
        metadata={
            "flag": "--multilora-usage-log-mib",
            "metavar": "MIB",
            "type": float,
            "help": "Size at which the usage log is renamed, with the time added to its name, and "
            "a new one begun (256 by default). Nothing is ever deleted.",
        },
    )
    latency_metrics: bool = field(
        default=False,
        metadata={
            "flag": "--multilora-latency-metrics",
            "help": "Add histograms of the time to the first token and between tokens by adapter "
            "to the metrics: 19 more series for each adapter.",
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
    status_page: bool = field(
        default=True,
        metadata={
            "flag": "--multilora-status-page",
            "help": "Show the adapters, slots and host memory on a page for browsers, /multilora "
            "(the default). The page itself is open to everybody; what it shows needs the keys "
            "that GET /v1/lora_adapters needs.",
        },
    )
    max_blends: int = field(
        default=32,
        metadata={
            "flag": "--multilora-max-blends",
            "metavar": "N",
            "type": int,
            "help": "Different blends of adapters that each tenant (all requests of no tenant "
            "together) may have in use at a time; more are forgotten when nobody uses them, and "
            "made again. 0: requests for blends are refused.",
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
        _check(self)

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


def _check(settings: MultiLoRAConfig) -> None:
    """Raises `ConfigError` for a value that a setting cannot have."""
    if settings.enabled is not None and not isinstance(settings.enabled, bool):
        raise ConfigError(
            f"{CONFIG_KEY}.enabled must be true, false or null, got {settings.enabled!r}"
        )
    if settings.backend not in BACKENDS:
        raise ConfigError(
            f"{CONFIG_KEY}.backend must be one of {', '.join(BACKENDS)}, got {settings.backend!r}"
        )
    if settings.store not in STORES:
        raise ConfigError(
            f"{CONFIG_KEY}.store must be one of {', '.join(STORES)}, got {settings.store!r}"
        )
    if not isinstance(settings.batch_invariant, bool):
        raise ConfigError(
            f"{CONFIG_KEY}.batch_invariant must be true or false, got {settings.batch_invariant!r}"
        )
    if settings.batch_invariant and settings.backend in _NOT_INVARIANT:
        raise ConfigError(
            f"{CONFIG_KEY}.batch_invariant does not go with the backend {settings.backend!r}: "
            f"{_NOT_INVARIANT[settings.backend]}. Choose the backend 'auto', 'native' or 'triton', "
            f"or leave batch_invariant out"
        )
    if not isinstance(settings.cache_policy, str) or not settings.cache_policy:
        raise ConfigError(
            f"{CONFIG_KEY}.cache_policy must be the name of a policy, got {settings.cache_policy!r}"
        )
    gib = settings.cpu_cache_gib
    if gib is not None and (
        isinstance(gib, bool) or not isinstance(gib, int | float) or not 0 < gib < float("inf")
    ):
        raise ConfigError(f"{CONFIG_KEY}.cpu_cache_gib must be a positive number, got {gib!r}")
    for name in _SWITCHES:
        if not isinstance(value := getattr(settings, name), bool):
            raise ConfigError(f"{CONFIG_KEY}.{name} must be true or false, got {value!r}")
    threads = settings.loader_threads
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 64:
        raise ConfigError(
            f"{CONFIG_KEY}.loader_threads must be a whole number from 1 to 64, got {threads!r}"
        )
    most = settings.metrics_max_adapters
    if isinstance(most, bool) or not isinstance(most, int) or not 0 <= most <= 100_000:
        raise ConfigError(
            f"{CONFIG_KEY}.metrics_max_adapters must be a whole number from 0 to 100000, got "
            f"{most!r}"
        )
    blends = settings.max_blends
    if isinstance(blends, bool) or not isinstance(blends, int) or not 0 <= blends <= 1_000:
        raise ConfigError(
            f"{CONFIG_KEY}.max_blends must be a whole number from 0 to 1000, got {blends!r}"
        )
    ratio = settings.fair_slowdown
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not is_number or not 1 < ratio <= 1_000:
        raise ConfigError(
            f"{CONFIG_KEY}.fair_slowdown must be a number above 1 and at most 1000, got {ratio!r}"
        )
    for name in ("load_timeout_s", "unload_timeout_s"):
        value = getattr(settings, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= 86_400:
            raise ConfigError(
                f"{CONFIG_KEY}.{name} must be a number of seconds above 0 and at most a day, "
                f"got {value!r}"
            )
    for name in _FILES:
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{CONFIG_KEY}.{name} must be the path of a file, got {value!r}")
    if settings.signing_keys is not None and settings.allow_pickle:
        raise ConfigError(
            f"{CONFIG_KEY}.signing_keys and {CONFIG_KEY}.allow_pickle exclude each other: a pickle "
            "is read too often for its signature to mean what is used. Sign safetensors files"
        )
    mib = settings.usage_log_mib
    if isinstance(mib, bool) or not isinstance(mib, int | float) or not 0 < mib < float("inf"):
        raise ConfigError(f"{CONFIG_KEY}.usage_log_mib must be a positive number, got {mib!r}")
    for name, what in _LISTS.items():
        values = getattr(settings, name)
        if not isinstance(values, list | tuple) or not all(
            isinstance(value, str) and value for value in values
        ):
            raise ConfigError(f"{CONFIG_KEY}.{name} must be a list of {what}, got {values!r}")
        # JSON has lists only; the settings are hashable.
        object.__setattr__(settings, name, tuple(dict.fromkeys(values)))
