"""Adapters by the names that clients know them by.

Behind the gateway vLLM's own table, `OpenAIServingModels.lora_requests`, holds what the gateway
puts there for each request. The public names are here. Without a gateway, in `vllm run-batch` say,
and where vLLM loads the adapters, vLLM's table has the public names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.attached import Attached

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_NAMES: Attached[MutableMapping[str, LoRARequest]] = Attached("public-names")

PART_KINDS = frozenset(
    ("text", "image", "audio", "video", "input", "output", "prompt", "refusal", "thinking", "tool")
)
"""Beginnings of the types that parts of a chat's messages have. vLLM applies an adapter of such a
name to everybody's chats with such a part."""


class _PublicNames(MutableMapping[str, "LoRARequest"]):
    """Keeps the operator's default adapters in vLLM's table too, where vLLM looks for them.

    What others put there under its public name, trainers' own routes for instance, counts as well.
    """

    def __init__(self, table: dict[str, LoRARequest], defaults: Collection[str]) -> None:
        self._own = dict(table)
        self._table = table
        self._defaults = defaults
        for name in self._own.keys() - set(defaults):
            del table[name]

    def __getitem__(self, name: str) -> LoRARequest:
        found = self._table.get(name)
        # Another name stands for a version, while a request is answered with it.
        return self._own[name] if found is None or found.lora_name != name else found

    def __setitem__(self, name: str, lora: LoRARequest) -> None:
        self._own[name] = lora
        self._table.pop(name, None)
        if name in self._defaults:
            self._table[name] = lora

    def __delitem__(self, name: str) -> None:
        del (self._own if name in self._own else self._table)[name]
        self._table.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        others = (name for name, lora in self._table.items() if lora.lora_name == name)
        return iter(dict.fromkeys((*self._own, *others)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def public_names(models: Any) -> MutableMapping[str, LoRARequest]:
    """The adapters that a server serves, by their public names."""
    found: MutableMapping[str, LoRARequest] | None = _NAMES.get(models)
    return models.lora_requests if found is None else found


def is_base_model(models: Any, name: str | None) -> bool:
    """Whether a name leads to the base model; an adapter may have taken it over."""
    return models.is_base_model(name) and name not in public_names(models)


def separate(models: Any) -> None:
    """Takes the public names out of vLLM's table, except those of default adapters.

    Raises:
        ConfigError: vLLM would apply an adapter to chats because of its name.
    """
    defaults = defaults_of(models)
    if wrong := sorted(PART_KINDS & models.lora_requests.keys() - set(defaults)):
        raise ConfigError(
            f"--lora-modules: vLLM applies an adapter that is named {wrong[0]!r} to all chats with "
            f"a part of that kind; give it another name, or make it the default for such parts "
            f"with --default-mm-loras"
        )
    _NAMES.set(models, _PublicNames(models.lora_requests, defaults))


def defaults_of(models: Any) -> Collection[str]:
    """The names of the operator's default adapters, which are kinds of parts of messages."""
    client: Any = getattr(models, "engine_client", None)
    lora_config = getattr(getattr(client, "vllm_config", None), "lora_config", None)
    return (lora_config and lora_config.default_mm_loras) or ()


def is_reserved(models: Any, name: str) -> bool:
    """Whether an adapter of a name would be applied to chats that do not ask for it."""
    return name in PART_KINDS and name not in defaults_of(models)
