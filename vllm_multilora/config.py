"""The settings, one frozen dataclass.

Every field is a flag of `vllm serve` and a key of `additional_config["multilora"]`, so that
`LLM(..., additional_config={"multilora": {"backend": "torch"}})` and `vllm serve ...
--multilora-backend torch` mean the same. A field states its meaning (its help) and which values it
accepts; `integration/settings/flags.py` makes the flags from the fields, so a new setting needs
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from vllm_multilora.errors import ConfigError
from vllm_multilora.wording import guess

CONFIG_KEY = "multilora"
"""The key of vLLM's `additional_config` under which the settings travel."""


def flag_of(setting: str) -> str:
    """The flag of a setting."""
    if setting == "enabled":
        return f"--{CONFIG_KEY}"
    return f"--{CONFIG_KEY}-{setting.replace('_', '-')}"


STORES = ("process", "thread")
BACKENDS = ("auto", "native", "torch", "triton", "vllm")
KERNELS = ("auto", "ours", "vllm")

_NOT_INVARIANT = {
    "torch": "plain PyTorch's sums depend on the batch",
    "vllm": "for vLLM's own kernels set VLLM_BATCH_INVARIANT=1 instead",
}


def _setting(
    default: Any, help: str, is_right: Callable[[Any], bool], expected: str, **options: Any
) -> Any:
    """A field: which values it may have, `expected` in words; `options` as of `add_argument`."""
    metadata = {"is_right": is_right, "expected": expected, "options": {"help": help, **options}}
    return field(default=default, metadata=metadata)


def _switch(default: bool, help: str) -> Any:
    return _setting(default, help, lambda value: isinstance(value, bool), "true or false")


def _choice(default: str, choices: tuple[str, ...], help: str) -> Any:
    expected = f"one of {', '.join(choices)}"
    return _setting(default, help, choices.__contains__, expected, choices=choices)


def _file(help: str, kind: str = "file", metavar: str = "FILE") -> Any:
    def is_right(value: Any) -> bool:
        return value is None or _is_text(value)

    return _setting(None, help, is_right, f"the path of a {kind}", metavar=metavar)


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


_SIZE = _Interval(0, 1e9, "a number above 0 and at most 1e9")  # in bytes below 2**63
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


def _is_address(value: Any) -> bool:
    port = value.rpartition(":")[2] if isinstance(value, str) else ""
    return port.isascii() and port.isdigit() and 0 < int(port) < 65536


@dataclass(frozen=True)
class MultiLoRAConfig:
    """Settings of the plugin; what each of them means, its help says."""

    enabled: bool | None = _setting(
        None,
        "Use vllm-multilora for LoRA. On by default with the vLLM versions that were tested, and "
        "with newer ones that have what it needs; --multilora forces LoRA serving on with others, "
        "--no-multilora leaves vLLM as it is.",
        lambda value: value is None or isinstance(value, bool),
        "true, false or null",
    )
    backend: str = _choice(
        "auto",
        BACKENDS,
        "What computes the LoRA products: native (C kernels, CPU), triton (NVIDIA and AMD "
        "GPUs), torch (plain PyTorch), vllm (stock, for comparison), or auto (the best one for "
        "the platform).",
    )
    kernels: str = _choice(
        "auto",
        KERNELS,
        "On GPUs, which kernels compute LoRA products: ours, vllm (vLLM's own), or auto (the "
        "default): at the first start on a card, both are checked and timed for each kind of "
        "layer, and the faster right ones serve.",
    )
    batch_invariant: bool = _switch(
        False,
        "Compute the same bits for a token's LoRA product in any batch; on GPUs this costs some "
        "speed. VLLM_BATCH_INVARIANT=1 does the same for the base model, and implies this flag.",
    )
    cache_policy: str = _setting(
        "lru",
        "Which adapter is evicted when room is needed: lru, lfu, slru, gdsf, the policy of an "
        "installed package, or module:Class.",
        _is_text,
        "the name of a policy",
        metavar="NAME",
    )
    cpu_cache_gib: float | None = _number(
        None,
        "GIB",
        _SIZE,
        "Host memory for adapters in GiB. All servers of this user on the machine share one "
        "copy of each adapter, and the largest budget that any of them sets applies. Without "
        "this flag, --max-cpu-loras is the only limit; without either, 10 %% of the machine's "
        "memory.",
    )
    async_loading: bool = _switch(
        True,
        "Load adapters in the background while other requests go on (the default). With "
        "--no-multilora-async-loading the engine waits for each load, as vLLM does.",
    )
    store: str = _choice(
        "process",
        STORES,
        "Where adapters are read, checked and kept in host memory: in a process shared by all "
        "servers of this user on the machine, which sandboxes its checks (process, the "
        "default), or on a thread of each engine, without a sandbox (thread).",
    )
    loader_threads: int = _whole(
        2,
        range(1, 64 + 1),
        "How many adapters this machine reads at a time; loads that take long do not count.",
    )
    load_timeout_s: float = _number(
        60.0, "SECONDS", _SECONDS, "Seconds after which a load is abandoned and its requests fail."
    )
    unload_timeout_s: float = _number(
        60.0, "SECONDS", _SECONDS, "Seconds after which an unloaded adapter's requests are ended."
    )
    allowed_roots: tuple[str, ...] = _list(
        "folders and URLs",
        "DIR",
        "Load adapters only from below this folder, after resolving links, or from below this URL: "
        "s3://, gs://, az://, hf://owner/repository or https://. May be given several times. "
        "Without it, adapters may be in any folder, and are not fetched from anywhere.",
    )
    disk_cache: str | None = _file(
        "Folder for adapters that are fetched from URLs; servers may share it. By default "
        "~/.cache/vllm-multilora/adapters.",
        *("folder", "DIR"),
    )
    disk_cache_gib: float = _number(
        20.0, "GIB", _SIZE, "GiB for that folder (20 by default). What was used longest ago goes."
    )
    source_credentials: str | None = _file(
        "File of NAME=value lines with credentials for URLs, such as AWS_SECRET_ACCESS_KEY. Only "
        "the process that fetches reads it, each time anew.",
    )
    adapter_dir: tuple[str, ...] = _list(
        "folders and URLs",
        "DIR",
        "Serve every sub-folder with an adapter under the folder's name, below a URL too. An "
        "adapter is loaded when it is first used; new, changed and removed ones are noticed. May "
        "be given several times.",
    )
    adapter_chat_templates: str | None = _file(
        "Folder of the chat templates (*.jinja) that adapters may bring for their chats; an "
        "adapter with another one is refused. Without it, chats have the base model's template.",
        *("folder", "DIR"),
    )
    preload: str | None = _setting(
        None,
        "Read these adapters when the server has started, behind what requests wait for: names "
        "with commas between, all (those that are registered or in an adapter directory by then), "
        "or @FILE with a name on each line.",
        lambda value: value is None or _is_text(value),
        "names with commas between, all, or @FILE",
        metavar="NAMES",
    )
    allow_pickle: bool = _switch(
        False, "Also read adapter_model.bin and .pt, with PyTorch's restricted unpickler."
    )
    allow_hub: bool = _switch(
        False,
        "Download an adapter from the Hugging Face hub if its path is not a folder, as vLLM "
        "does. The download counts towards the time limit of the load.",
    )
    check_finite: bool = _switch(
        True, "Refuse adapters with NaN or infinity in their weights (the default)."
    )
    quarantine: bool = _switch(
        True,
        "Take an adapter out of service if it produces non-finite numbers, and clear blocks of "
        "the KV cache before they are reused, so that no request reads what such an adapter "
        "left there (the default).",
    )
    dora: bool = _switch(
        False,
        "Also serve DoRA adapters (PEFT's use_dora). Slots grow by 4 bytes for each output of "
        "each layer; vllm-multilora plan shows how much that is in total.",
    )
    fair_shares: bool = _switch(
        False,
        "While several tenants have requests, give each the same share of tokens, places and "
        "slots, or shares by weight; a request without a tenant counts for its adapter, and the "
        "size of an adapter counts too. Without this flag (the default) or with "
        "--scheduling-policy priority, requests are served in vLLM's order.",
    )
    # A request that comes also waits for the step under way: this keeps first tokens within 1.5.
    fair_slowdown: float = _number(
        1.4,
        "RATIO",
        _RATIO,
        "With fair shares, how many times as long a step may become because of tenants that "
        "have lately been served much more than another one in the step. How many of their "
        "tokens that allows is found by measuring. A lower ratio shortens the others' time per "
        "token, and lengthens the requests of those tenants.",
    )
    routes: str | None = _file(
        "YAML or JSON file of routes: public model names that lead to adapters by share, by "
        "language or by other values in the request, with fallbacks. Read again when it "
        "changes. Only for servers: LLM() names adapters itself.",
    )
    route_names: bool = _switch(
        False,
        "Answers to a route's name have that name as their `model`, instead of the adapter's, "
        "which the header x-multilora-adapter and the field `multilora` name either way.",
    )
    base_alias: bool = _switch(
        False,
        "An adapter may be loaded under a name of the base model, which keeps its other ones "
        "(--served-model-name), and leads to the base model again when it is unloaded.",
    )
    admin_key_file: str | None = _file(
        "File with the operators' keys, one per line. Only operators may load and unload "
        "adapters and see folders. Read again when it changes. Without this flag the "
        "MULTILORA_ADMIN_KEY environment variable applies; without either, the API key is the "
        "operator's.",
    )
    tenants: str | None = _file(
        "YAML or JSON file of tenants: their keys, the adapters and routes that each may use "
        "and see, weights and limits. Read again when it changes. Only for servers.",
    )
    require_digest: str | None = _file(
        "Serve an adapter only if it has the digest that this file lists for its name: a JSON "
        'object, as vllm-multilora digest --json prints it; "*": "any" allows adapters that are '
        "not listed. Read again when it changes.",
    )
    signing_keys: str | None = _file(
        "Serve an adapter only if it is signed (OpenSSF model signing, model.sig in its folder) "
        "by one of the public keys or certificates in this PEM file, and has not changed since. "
        "Read again for each adapter that is loaded. Needs vllm-multilora[signing].",
    )
    usage_log: str | None = _file(
        "Append a line of JSON to this file for each prompt that was answered or abandoned: "
        "time, tenant, route, adapter, version, tokens, status. Only for servers.",
    )
    usage_log_mib: float = _number(
        256.0,
        "MIB",
        _SIZE,
        "Size at which the usage log is renamed, with the time added to its name, and a new one "
        "is started (256 by default). Nothing is ever deleted.",
    )
    latency_metrics: bool = _switch(
        False,
        "Add histograms by adapter of the time to the first token and the time per output token "
        "to the metrics: 19 more series for each adapter.",
    )
    metrics_max_adapters: int = _whole(
        200,
        range(100_000 + 1),
        "How many adapters have series of their own in the LoRA metrics at a time; the others are "
        'counted together as lora_name="__other__".',
    )
    status_port: str | None = _setting(
        None,
        "Answer GET /metrics and GET /v1/lora_adapters on this port too, without keys: for engines "
        "without vLLM's server (Dynamo, Ray, LLM()). On the loopback address if none is given. "
        "With data parallelism each engine adds its index to the port.",
        lambda value: value is None or _is_address(value),
        "PORT or ADDRESS:PORT, like 9400 or 0.0.0.0:9400",
        metavar="PORT",
    )
    status_page: bool = _switch(
        True,
        "Show the adapters, slots and host memory on a web page, /multilora (the default). "
        "Anyone may open the page; its data needs the same key as GET /v1/lora_adapters.",
    )
    max_blends: int = _whole(
        32,
        range(1_000 + 1),
        "How many different blends of adapters each tenant may have in use at a time; all "
        "requests without a tenant count as one tenant. Beyond that, blends that nobody uses "
        "are forgotten, and made again when requested. 0 refuses requests for blends.",
    )
    pin: tuple[str, ...] = _list(
        "adapter names",
        "NAME",
        "An adapter that keeps its slot once it has one. May be given several times, for fewer "
        "adapters than --max-loras.",
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not setting.metadata["is_right"](value):
                raise ConfigError(
                    f"{flag_of(setting.name)} ({CONFIG_KEY}.{setting.name} in additional_config) "
                    f"must be {setting.metadata['expected']}, got {value!r}"
                )
            if isinstance(value, list | tuple):
                # JSON has lists only; the settings are hashable.
                object.__setattr__(self, setting.name, tuple(dict.fromkeys(value)))
        if self.batch_invariant and self.backend in _NOT_INVARIANT:
            raise ConfigError(
                f"--multilora-batch-invariant cannot be used with --multilora-backend "
                f"{self.backend}: {_NOT_INVARIANT[self.backend]}. Choose auto, native or triton, "
                f"or leave --multilora-batch-invariant out"
            )
        if self.signing_keys is not None and self.allow_pickle:
            raise ConfigError(
                "--multilora-signing-keys and --multilora-allow-pickle cannot be used together: a "
                "pickle is read several times, so its signature does not prove which bytes are "
                "used. Sign safetensors files"
            )

    @property
    def directories(self) -> tuple[str, ...]:
        """The adapter directories that are folders, and no URLs."""
        return tuple(each for each in self.adapter_dir if "://" not in each)

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> MultiLoRAConfig:
        """The settings in `additional_config`, defaults where there are none; or `ConfigError`."""
        settings = given_settings(additional_config)
        known = [f.name for f in fields(cls)]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"unknown setting {key!r} in {CONFIG_KEY}{guess(str(key), known)} "
                    f"(known: {', '.join(known)})"
                )
        return cls(**settings)


def given_settings(additional_config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What `additional_config` has for the plugin, unchecked; `ConfigError`: it is no mapping."""
    settings = (additional_config or {}).get(CONFIG_KEY, {})
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f'additional_config["{CONFIG_KEY}"] must be a mapping of settings such as '
            f'{{"backend": "auto"}}, got {settings!r}'
        )
    return settings
