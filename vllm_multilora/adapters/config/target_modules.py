"""Which modules a configuration names: PEFT leaves tensors of all others out, and says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_multilora.adapters.config.adapter_config import AdapterConfig
from vllm_multilora.adapters.config.patterns import (
    Budget,
    PatternError,
    PatternMatcher,
    check_pattern,
)
from vllm_multilora.adapters.model.tensor_names import (
    FUSED_EXPERTS,
    WRAPPED_EXPERTS,
    is_of,
    unwrapped,
)

_ALL = "all-linear"


class Targets:
    """The modules that a configuration names.

    Names in a list may be whole ones. These are compared from a layer's number on, or by their last
    part if they have none: what stands before that may be the training framework's. Expressions
    that could take long, as some trainers write, are not matched.
    """

    def __init__(self, config: AdapterConfig) -> None:
        raw, targets = config.raw, config.target_modules
        self._is_named_by_weight = config.is_named_by_weight
        self._is_tied = bool(raw.get("ensure_weight_tying"))
        self._target = _matcher(targets)
        self._exclusion = _matcher(raw.get("exclude_modules"))
        self._excluded = frozenset(_names(raw.get("exclude_modules")))
        self._ends: frozenset[str] | None = None
        self._whole: frozenset[str] = frozenset()
        self._layers: frozenset[int] = frozenset()
        pattern = raw.get("layers_pattern") or ()
        self._lists = [pattern] if isinstance(pattern, str) else _names(pattern)
        if isinstance(targets, tuple) and (targets or raw.get("target_parameters")):
            self._whole = frozenset(map(unwrapped, targets))
            self._ends = frozenset(map(_end, self._whole))
            layers = raw.get("layers_to_transform")
            if all(name.isidentifier() for name in self._lists):
                self._layers = frozenset([layers] if isinstance(layers, int) else layers or ())

    def leaves_out(self, module: str) -> str | None:
        """The key that leaves a module out, by its name without PEFT's prefix; None: none known."""
        if module.endswith((FUSED_EXPERTS, WRAPPED_EXPERTS)) or self._is_named_by_weight(module):
            return None  # PEFT adapts parameters whatever modules it adapts
        parts = module.split(".")
        number = self._layer(parts)
        is_named = self._ends is None or _end(module) in self._ends or is_of(module, self._whole)
        # Of a tied head PEFT takes the name out of the list that it saves.
        if not (is_named and _fits(self._target, module, unknown=True)) and not (
            self._is_tied and number is None
        ):
            return "target_modules"
        if self._layers and number not in self._layers and module not in self._whole:
            return "layers_to_transform"
        if is_of(module, self._excluded) or _fits(self._exclusion, module, unknown=False):
            return "exclude_modules"
        return None

    def _layer(self, parts: Sequence[str]) -> int | None:
        """The number of a module's layer where PEFT looks for it."""
        first = 1 if self._lists else 2
        for place, part in enumerate(parts[first:-1], first):
            if part.isdecimal() and (not self._lists or parts[place - 1] in self._lists):
                return int(part)
        return None


def _matcher(expression: object) -> PatternMatcher[bool] | None:
    """What matches whole names, as PEFT does; None: nothing, or what could take long."""
    if not isinstance(expression, str) or not expression or expression.lower() == _ALL:
        return None
    pattern, budget = f"^(?:{expression})", Budget()
    try:
        check_pattern(pattern, budget)
    except PatternError:
        return None
    return PatternMatcher({pattern: True}, budget)


def _fits(matcher: PatternMatcher[bool] | None, module: str, *, unknown: bool) -> bool:
    if matcher is None:
        return unknown
    try:
        return matcher.get(module) is not None
    except PatternError:
        return unknown


def _end(name: str) -> str:
    """A name from its first number on; the last part of one without numbers."""
    parts = name.split(".")
    first = next((at for at, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[first:])


def _names(value: object) -> list[str]:
    return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
