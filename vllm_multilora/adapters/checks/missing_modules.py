"""Why the base model lacks a module that an adapter has, and what to do about it."""

from __future__ import annotations

import re
from functools import cached_property

from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.adapters.problems import Code, shown, shown_name

_NUMBER = re.compile(r"\.(\d{1,9})(?=\.)")
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
# Names of projections that some checkpoints have merged, and what others have in their place.
_MERGED = {
    "qkv_proj": _QKV,
    "query_key_value": _QKV,
    "qkv": _QKV,
    "Wqkv": _QKV,
    "W_pack": _QKV,
    "c_attn": _QKV,
    "linear_qkv": _QKV,
    "gate_up_proj": _GATE_UP,
    "linear_fc1": _GATE_UP,
}


class MissingModules:
    """Explains modules that a base model lacks."""

    def __init__(self, layout: ModelLayout, config: AdapterConfig | None) -> None:
        self._layout = layout
        self._config = config

    @property
    def hint(self) -> str:
        """What to do about an adapter that seems to be for another base model."""
        name = self._config.base_model if self._config else None
        trained = f"adapter_config.json names the base model {shown(name)}: " if name else ""
        return f"{trained}use an adapter that was trained on the served base model"

    def explain(self, module: str) -> tuple[Code, str, str, str]:
        """The kind of problem; what a module is; what the base model has; what to do."""
        parent, _, kind = module.rpartition(".")
        beside = f"{parent}." if parent else ""
        parts = _MERGED.get(kind, ())
        if parts and all(beside + part in self._layout.by_name for part in parts):
            return (
                Code.MERGED_MODULE,
                f"for {kind}",
                f"{', '.join(parts)}, which are adapted one by one here",
                f"split B's rows between {', '.join(parts)}, and give each the same A",
            )
        for merged, parts in _MERGED.items():
            if kind in parts and beside + merged in self._layout.by_name:
                return (
                    Code.MERGED_MODULE,
                    f"for {kind}",
                    f"{merged}, which is adapted as a whole here",
                    f"train the adapter with {merged} as its target",
                )
        number = _NUMBER.search(module)
        if number:
            layers = self._layers.get(_NUMBER.sub(".*", module, count=1))
            if layers is not None and int(number[1]) > layers:
                return (
                    Code.LAYER_OUT_OF_RANGE,
                    f"for layer {int(number[1])}",
                    f"a layer from 0 to {layers}",
                    self.hint,
                )
        return (
            Code.UNKNOWN_MODULE,
            f"for the module {shown_name(kind)}",
            f"modules that the base model has ({', '.join(self.kinds)})",
            self.hint,
        )

    @cached_property
    def _layers(self) -> dict[str, int]:
        """The last layer that each kind of module is in, by its name with the layer left open."""
        last: dict[str, int] = {}
        for name in self._layout.by_name:
            if number := _NUMBER.search(name):
                kind = _NUMBER.sub(".*", name, count=1)
                last[kind] = max(last.get(kind, 0), int(number[1]))
        return last

    @cached_property
    def kinds(self) -> list[str]:
        """The last parts of the modules' names that the base model has, a dozen at most."""
        names = [*self._layout.by_name, *sorted(self._layout.special)]
        return list(dict.fromkeys(name.rpartition(".")[2] for name in names))[:12]
