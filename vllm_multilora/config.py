"""The settings, one frozen dataclass.

Every field is a flag of `vllm serve` and a key of `additional_config["multilora"]`, so that
`LLM(..., additional_config={"multilora": {"backend": "torch"}})` and
`vllm serve ... --multilora-backend torch` mean the same. What a setting means is said by its help,
what it may be by its kind; `integration/patching/flags.py` makes the flags of them, so a field
added here needs no second place.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from vllm_multilora.errors import ConfigError

CONFIG_KEY = "multilora"
"""The key of vLLM's `additional_config` under which the settings travel."""

STORES = ("process", "thread")
BACKENDS = ("auto", "native", "torch", "triton", "vllm")

_NOT_INVARIANT = {
    "torch": "plain PyTorch's sums depend on the batch",
    "vllm": "for vLLM's own kernels set VLLM_BATCH_INVARIANT=1 instead",
}


def _setting(
    default: Any, help: str, is_right: Callable[[Any], bool], expected: str, **options: Any
) -> Any:
    """A field.

    Args:
        default: Its value where none is given.
        help: What it means, as `argparse` takes it.
        is_right: Whether it may have a value.
        expected: Such values, for errors.
        **options: More of `argparse.ArgumentParser.add_argument`.
    """
    metadata = {"is_right": is_right, "expected": expected, "options": {"help": help, **options}}
    return field(default=default, metadata=metadata)


def _switch(default: bool, help: str) -> Any:
    return _setting(default, help, lambda value: isinstance(value, bool), "true or false")


def _choice(default: str, choices: tuple[str, ...], help: str) -> Any:
    expected = f"one of {', '.join(choices)}"
    return _setting(default, help, choices.__contains__, expected, choices=choices)


def _file(help: str) -> Any:
    def is_right(value: Any) -> bool:
        return value is None or _is_text(value)

    return _setting(None, help, is_right, "the path of a file", metavar="FILE")


def _list(of: str, metavar: str, help: str) -> Any:
    def is_right(value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(_is_text, value))

    return _setting((), help, is_right, f"a list of {of}", metavar=metavar, action="append")


def _whole(default: int, allowed: range, help: str) -> Any:
    def is_right(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value in allowed

    expected = f"a whole number from {allowed[0]} to {allowed[-1]}"
    return _setting(default, help, is_right, expected, metavar="N", type=int)


class _Interval(NamedTuple):
    above: float
    most: float
    text: str


_POSITIVE = _Interval(0, sys.float_info.max, "a positive number")
_SECONDS = _Interval(0, 86_400, "a number of seconds above 0 and at most a day")
_RATIO = _Interval(1, 1_000, "a number above 1 and at most 1000")


def _number(default: float | None, metavar: str, allowed: _Interval, help: str) -> Any:
    def is_right(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return (value is None and default is None) or (
            is_number and allowed.above < value <= allowed.most
        )

    return _setting(default, help, is_right, allowed.text, metavar=metavar, type=float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


@dataclass(frozen=True)
class MultiLoRAConfig:
    """Settings of the plugin; what each of them means, its help says."""

    enabled: bool | None = _setting(
        None,
        "Use vllm-multilora for LoRA. On by default with supported vLLM versions; "
        "--multilora forces it on with others, --no-multilora leaves vLLM as it is.",
        lambda value: value is None or isinstance(value, bool),
        "true, false or null",
    )
    backend: str = _choice(
        "auto",
        BACKENDS,
        "What computes the adapters' products: native (C kernels, CPU), triton (NVIDIA "
        "and AMD GPUs), torch (plain PyTorch), vllm (stock, for comparison), or auto (the best "
        "for the platform).",
    )
    batch_invariant: bool = _switch(
        False,
        "Give an adapter's product for a token the same bits in any batch, at some "
        "speed on GPUs. VLLM_BATCH_INVARIANT=1 does the same for the base model, and includes "
        "this.",
    )
    cache_policy: str = _setting(
        "lru",
        "Which adapter gives up its place when room is needed: lru, lfu, slru, gdsf, a "
        "policy of an installed package, or module:Class.",
        _is_text,
        "the name of a policy",
        metavar="NAME",
    )
    cpu_cache_gib: float | None = _number(
        None,
        "GIB",
        _POSITIVE,
        "Host memory for adapters in GiB: one copy of each for all servers of this "
        "user on the machine, and the largest budget that any of them asks for counts. Without "
        "it, --max-cpu-loras is the only limit; without either, 10 %% of the machine's memory.",
    )
    async_loading: bool = _switch(
        True,
        "Load adapters in the background, while other requests go on (the default); "
        "--no-multilora-async-loading makes the engine wait, as vLLM does.",
    )
    store: str = _choice(
        "process",
        STORES,
        "Where adapters are read, checked and kept in host memory: in a process that "
        "all servers of this user on the machine share, its checks sandboxed (process, the "
        "default), or on a thread of each engine, without a sandbox (thread).",
    )
    loader_threads: int = _whole(
        2,
        range(1, 64 + 1),
        "Adapters that are read at once on this machine; those that take long do not count.",
    )
    load_timeout_s: float = _number(
        60.0,
        "SECONDS",
        _SECONDS,
        "Seconds after which a load is given up and its requests fail.",
    )
    unload_timeout_s: float = _number(
        60.0,
        "SECONDS",
        _SECONDS,
        "Seconds that an unloaded adapter's running requests have to end; then they are ended.",
    )
    allowed_roots: tuple[str, ...] = _list(
        "folders",
        "DIR",
        "Adapters load only from below this folder, links resolved; may be given "
        "several times. Without it, from anywhere.",
    )
    adapter_dir: tuple[str, ...] = _list(
        "folders",
        "DIR",
        "Serve every sub-folder with an adapter under the folder's name, from its "
        "first use on; new, changed and removed ones are noticed. May be given several times.",
    )
    allow_pickle: bool = _switch(
        False,
        "Read adapter_model.bin and .pt too, with PyTorch's restricted unpickler.",
    )
    allow_hub: bool = _switch(
        False,
        "Download an adapter from the Hugging Face hub where its path is no folder, "
        "as vLLM does; the time counts towards its load's limit.",
    )
    check_finite: bool = _switch(
        True,
        "Refuse adapters with NaN or infinity in their weights (the default).",
    )
    quarantine: bool = _switch(
        True,
        "Take an adapter out of service whose numbers are not finite in use, and empty "
        "blocks of the KV cache before they are used again, so that nobody reads what it has "
        "left there (the default).",
    )
    dora: bool = _switch(
        False,
        "Serve DoRA adapters (PEFT's use_dora) too. Slots get larger by 4 bytes for "
        "each output of each layer; vllm-multilora plan says how much that is.",
    )
    fair_shares: bool = _switch(
        False,
        "While several tenants (adapters, where a request is no tenant's) have "
        "requests, give each of them the same share of tokens, places and slots, or shares by "
        "weight. Without it requests are served in the order in which they come, as by vLLM "
        "(the default); with --scheduling-policy priority too.",
    )
    fair_slowdown: float = _number(
        1.5,
        "RATIO",
        _RATIO,
        "With fair shares, how many times as long a step may take because of the "
        "tokens of those who have had much more of late than another that takes part in it. "
        "They have as many of a step as it takes, by measured times. The lower, the less the "
        "others' tokens wait for theirs, and the longer their own requests take.",
    )
    routes: str | None = _file(
        "YAML or JSON file of routes: public model names that lead to adapters by "
        "share, by language or by whatever the request says, with fallbacks. Read again when "
        "it changes. Only for servers: LLM() names adapters itself.",
    )
    admin_key_file: str | None = _file(
        "File with the operators' keys, one in each line: only they may load and "
        "unload adapters, and only they are told folders. Without it MULTILORA_ADMIN_KEY "
        "counts; without either, the API key is the operator's.",
    )
    tenants: str | None = _file(
        "YAML or JSON file of tenants: which key is whose, the adapters and routes "
        "that each may use and see, weights and limits. Read again when it changes. Only for "
        "servers.",
    )
    require_digest: str | None = _file(
        "Serve adapters only with the digests that this file has for their names: a "
        'JSON object, as vllm-multilora digest --json prints it; "*": "any" lets all others '
        "be. Read again when it changes.",
    )
    signing_keys: str | None = _file(
        "Serve only adapters that are signed (OpenSSF model signing, model.sig in the "
        "adapter's folder) by one of the public keys or certificates in this PEM file, and are "
        "as they were signed. Read again for each adapter that is loaded. Needs "
        "vllm-multilora[signing].",
    )
    usage_log: str | None = _file(
        "Append a line of JSON to this file for each prompt that was answered or given "
        "up: time, tenant, route, adapter, version, tokens, status. Only for servers.",
    )
    usage_log_mib: float = _number(
        256.0,
        "MIB",
        _POSITIVE,
        "Size at which the usage log is renamed, with the time added to its name, and "
        "a new one begun (256 by default). Nothing is ever deleted.",
    )
    latency_metrics: bool = _switch(
        False,
        "Add histograms of the time to the first token and between tokens by adapter "
        "to the metrics: 19 more series for each adapter.",
    )
    metrics_max_adapters: int = _whole(
        200,
        range(100_000 + 1),
        "Adapters with series of their own in the LoRA metrics; the others are counted "
        'together as lora_name="__other__".',
    )
    status_page: bool = _switch(
        True,
        "Show the adapters, slots and host memory on a page for browsers, /multilora "
        "(the default). The page itself is open to everybody; what it shows needs the keys "
        "that GET /v1/lora_adapters needs.",
    )
    max_blends: int = _whole(
        32,
        range(1_000 + 1),
        "Different blends of adapters that each tenant (all requests of no tenant "
        "together) may have in use at a time; more are forgotten when nobody uses them, and "
        "made again. 0: requests for blends are refused.",
    )
    pin: tuple[str, ...] = _list(
        "adapter names",
        "NAME",
        "An adapter that keeps its slot once it has one; may be given several times, "
        "for fewer adapters than --max-loras.",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not setting.metadata["is_right"](value):
                raise ConfigError(
                    f"{CONFIG_KEY}.{setting.name} must be {setting.metadata['expected']}, got "
                    f"{value!r}"
                )
            if isinstance(value, list | tuple):
                # JSON has lists only; the settings are hashable.
                object.__setattr__(self, setting.name, tuple(dict.fromkeys(value)))
        if self.batch_invariant and self.backend in _NOT_INVARIANT:
            raise ConfigError(
                f"{CONFIG_KEY}.batch_invariant does not go with the backend {self.backend!r}: "
                f"{_NOT_INVARIANT[self.backend]}. Choose the backend 'auto', 'native' or 'triton', "
                f"or leave batch_invariant out"
            )
        if self.signing_keys is not None and self.allow_pickle:
            raise ConfigError(
                f"{CONFIG_KEY}.signing_keys and {CONFIG_KEY}.allow_pickle exclude each other: a "
                "pickle is read too often for its signature to mean what is used. Sign "
                "safetensors files"
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
