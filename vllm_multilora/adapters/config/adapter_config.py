"""`adapter_config.json`: the parts that decide how an adapter is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.config.patterns import (
    MAX_PATTERNS,
    Budget,
    PatternError,
    PatternMatcher,
    check_expression,
    check_pattern,
)
from vllm_multilora.adapters.files.json_text import JsonTooLargeError, parse_json
from vllm_multilora.adapters.model.tensor_names import FUSED_EXPERTS, WRAPPED, is_of
from vllm_multilora.adapters.problems import (
    MAX_PROBLEMS,
    Code,
    Problem,
    more_problems,
    shown,
    shown_name,
)

_Value = TypeVar("_Value")

_MAX_RANK = 1 << 20  # more than any model is wide; keeps scalings within floats
_MAX_TOKEN = (1 << 31) - 1
_MAX_PARTS = 200_000  # of lists, objects and values; 20,000 patterns with a rank each have 40,000

MAX_INVOCATION_TOKENS = 64
"""Tokens of the text that activates an adapter; a chat template's generation prompt has three."""


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter's configuration, as PEFT writes it.

    Attributes:
        rank: `r`, of modules that no pattern names.
        alpha: `lora_alpha`, likewise.
        target_modules: As in the file: names, or one regular expression; None if it is null.
        rslora: Whether the scaling is alpha / sqrt(rank) instead of alpha / rank
            (rank-stabilised LoRA, https://arxiv.org/abs/2312.03732).
        target_weights: Those of `target_parameters` that are modules' weights, such as a router's
            `gate.weight`: patterns are matched with their names there, not with the modules'.
        bias: `none`, `all` or `lora_only`: which of the base model's biases were trained.
        invocation_tokens: `alora_invocation_tokens`: the token ids from whose last occurrence in a
            prompt on the adapter acts (activated LoRA, https://arxiv.org/abs/2504.12397); none: it
            acts on all of it.
        base_model: `base_model_name_or_path`: what it was trained on, in its author's words.
        budget: What all of its patterns together may take.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str | None = None
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_weights: frozenset[str] = frozenset()
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    dora: bool = False
    invocation_tokens: tuple[int, ...] = ()
    base_model: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    budget: Budget = field(default_factory=Budget, repr=False, compare=False)

    @classmethod
    def read(cls, text: str | bytes, where: str) -> tuple[AdapterConfig | None, list[Problem]]:
        """Reads a configuration, which is None if there are problems, and all problems of its keys.

        `where` is what problems call it, such as its path.
        """
        raw = read_object(text, where)
        if isinstance(raw, Problem):
            return None, [raw]
        reader = _Reader(raw, where)
        config = reader.config() if reader.is_lora() else None
        return (None if reader.problems else config), reader.problems

    def rank_of(self, module: str) -> int:
        """The rank of a module, by its name in the checkpoint without PEFT's prefix.

        Raises:
            AdapterFormatError: The patterns take too long to match.
        """
        return self._match("rank_pattern", self._ranks, module, self.rank)

    def scaling(self, module: str) -> float:
        """The factor of B @ A for a module; its name and errors as of `rank_of`."""
        rank = self.rank_of(module)
        alpha = self._match("alpha_pattern", self._alphas, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    @cached_property
    def _ranks(self) -> PatternMatcher[int]:
        return PatternMatcher(self.rank_pattern, self.budget)

    @cached_property
    def _alphas(self) -> PatternMatcher[float]:
        return PatternMatcher(self.alpha_pattern, self.budget)

    def is_named_by_weight(self, module: str) -> bool:
        """Whether `target_parameters` name the weight of a module, and so the module."""
        return is_of(f"{module}.weight", self.target_weights)

    def key_of(self, module: str) -> str:
        """The key that names a module: `target_parameters` if these name a parameter of it."""
        name = module.removesuffix(WRAPPED)
        in_experts = name.endswith(FUSED_EXPERTS) and "" in self._owners
        is_owner = in_experts or is_of(name, self._owners - {""})
        return "target_parameters" if is_owner else "target_modules"

    @cached_property
    def _owners(self) -> frozenset[str]:
        """The modules whose parameters are targets; empty where a parameter alone is named."""
        names = self.raw.get("target_parameters") or ()
        return frozenset(name.rpartition(".")[0] for name in names)

    def _match(
        self, key: str, matcher: PatternMatcher[_Value], module: str, default: _Value
    ) -> _Value:
        if not matcher:
            return default
        try:
            matched = f"{module}.weight" if self.is_named_by_weight(module) else module
            value = matcher.get(matched)
        except PatternError as error:
            raise AdapterFormatError.at(
                Code.CONFIG_PATTERN,
                "adapter_config.json",
                f"a list of patterns with which {error}",
                "the ends of module names, such as 'q_proj'",
                where=key,
            ) from None
        return default if value is None else value


class _Reader:
    """Takes keys from a configuration and notes precisely what is wrong with each."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self._problems: list[Problem] = []
        self._more = 0
        self._raw = raw
        self._where = where
        self._budget = Budget()

    @property
    def problems(self) -> list[Problem]:
        """What was wrong; of very much, the first of it and a count."""
        return [*self._problems, *([more_problems(self._where, self._more)] if self._more else [])]

    def _note(self, problem: Problem) -> None:
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append(problem)
        else:
            self._more += 1

    def is_lora(self) -> bool:
        """Whether it is one of LoRA, as far as it says; other kinds have keys of their own."""
        if self._raw.get("peft_type") in (None, "LORA"):
            return True
        self._refuse("peft_type", "'LORA'", code=Code.UNSUPPORTED_PEFT_TYPE)
        return False

    def config(self) -> AdapterConfig:
        config = AdapterConfig(
            rank=self._rank("r", self._required("r", "a positive whole number")),
            alpha=self._alpha("lora_alpha", self._required("lora_alpha", "a number")),
            target_modules=self._target_modules(),
            rslora=self._flag("use_rslora"),
            rank_pattern=self._patterns("rank", self._rank),
            alpha_pattern=self._patterns("alpha", self._alpha),
            target_weights=self._target_weights(),
            modules_to_save=self._names("modules_to_save") or (),
            bias=self._bias(),
            dora=self._flag("use_dora"),
            invocation_tokens=self._invocation_tokens(),
            base_model=self._optional(
                "base_model_name_or_path",
                lambda value: isinstance(value, str),
                "the name of the base model",
            ),
            raw=self._raw,
            budget=self._budget,
        )
        self._check_unused()
        return config

    def _refuse(
        self, key: str, expected: str, *, at: str = "", found: str = "", code: Code | None = None
    ) -> None:
        """Notes that a key, or the entry `at` of one, has a wrong value."""
        where = f"{key}[{shown(at)}]" if at else key
        name = where if at else repr(key)
        found = found or shown(self._raw.get(key))
        message = f"{self._where}: {name} is {found}, expected {expected}"
        self._note(Problem(code or Code.CONFIG_VALUE, self._where, where, found, expected, message))

    def _required(self, key: str, expected: str) -> Any:
        if key not in self._raw:
            self._refuse(key, expected, found="missing", code=Code.CONFIG_KEY_MISSING)
            return 1  # any valid value: the configuration is not going to be used
        return self._raw[key]

    def _rank(self, key: str, value: Any, at: str = "") -> int:
        if type(value) is int and 0 < value <= _MAX_RANK:
            return value
        large = type(value) is int and value > _MAX_RANK
        expected = f"at most {_MAX_RANK}" if large else "a positive whole number"
        self._refuse(key, expected, at=at, found=shown(value))
        return 1

    def _alpha(self, key: str, value: Any, at: str = "") -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._refuse(key, "a number", at=at, found=shown(value))
            return 1.0
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self._refuse(key, "a finite number", at=at, found=shown(value))
        return number

    def _optional(self, key: str, is_right: Callable[[Any], bool], expected: str) -> Any:
        """A key's value; None where there is none, or a wrong one."""
        value = self._raw.get(key)
        if value is None or is_right(value):
            return value
        self._refuse(key, expected)
        return None

    def _flag(self, key: str) -> bool:
        return bool(self._optional(key, lambda value: isinstance(value, bool), "true or false"))

    def _bias(self) -> str:
        value = self._raw.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            self._refuse("bias", "'none', 'all' or 'lora_only'")
        return str(value)

    def _invocation_tokens(self) -> tuple[int, ...]:
        key = "alora_invocation_tokens"
        value = self._raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            self._refuse(key, "a list of token ids, or null for a LoRA adapter")
            return ()
        if not 0 < len(value) <= MAX_INVOCATION_TOKENS:
            found = f"a list of {len(value)}"
            expected = f"1 to {MAX_INVOCATION_TOKENS} token ids, or null for a LoRA adapter"
            self._refuse(key, expected, found=found)
            return ()
        for place, token in enumerate(value):
            if type(token) is not int or not 0 <= token <= _MAX_TOKEN:
                self._refuse(key, "a token id", at=str(place), found=shown(token))
                return ()
        return tuple(value)

    def _target_modules(self) -> tuple[str, ...] | str | None:
        value = self._required("target_modules", "a list of module names, or a text")
        if isinstance(value, str):
            try:
                check_expression(value)
            except PatternError as error:
                self._refuse(
                    "target_modules",
                    "names, 'all-linear' or a regular expression",
                    found=f"{shown(value)}, which {error}",
                    code=Code.CONFIG_PATTERN,
                )
            return value
        return self._names("target_modules", " or a text") if "target_modules" in self._raw else ()

    def _target_weights(self) -> frozenset[str]:
        names = self._names("target_parameters") or ()
        return frozenset(name for name in names if f".{name}".endswith(".weight"))

    def _names(self, key: str, or_what: str = "") -> tuple[str, ...] | None:
        value = self._optional(
            key,
            lambda names: isinstance(names, list) and all(isinstance(n, str) for n in names),
            f"a list of module names{or_what}",
        )
        return None if value is None else tuple(value)

    def _check_unused(self) -> None:
        """Keys that PEFT wants right, although serving does not depend on them.

        Which layers and modules an adapter has is what its tensors say, with which these keys are
        compared (`targets`); `fan_in_fan_out` is about how the base model stores its weights, and A
        and B are the same either way.
        """
        self._flag("fan_in_fan_out")
        layers = self._raw.get("layers_to_transform")
        numbers = layers if isinstance(layers, list) else [layers]
        if layers is not None and not all(type(n) is int and n >= 0 for n in numbers):
            self._refuse("layers_to_transform", "the number of a layer, or a list of numbers")

    def _patterns(self, what: str, read: Callable[[str, Any, str], _Value]) -> Mapping[str, _Value]:
        key = f"{what}_pattern"
        value = self._raw.get(key) or {}
        if not isinstance(value, dict):
            self._refuse(key, f"an object from patterns of module names to one {what} each")
            return {}
        if len(value) > MAX_PATTERNS:
            self._refuse(key, f"at most {MAX_PATTERNS}", found=f"{len(value)} patterns")
            return {}
        found = {}
        with self._budget.spending():
            for pattern, entry in value.items():
                try:
                    check_pattern(pattern, self._budget)
                except PatternError as error:
                    self._refuse_pattern(key, pattern, error)
                else:
                    found[pattern] = read(key, entry, pattern)
        return found

    def _refuse_pattern(self, key: str, pattern: str, error: PatternError) -> None:
        found = f"the key {shown(pattern)}, which {error}"
        self._note(
            Problem(
                Code.CONFIG_PATTERN,
                self._where,
                key,
                found,
                "the end of a module's name, such as 'q_proj' or 'layers.3.mlp.up_proj'",
                f"{self._where}: {key!r} has {found}; expected the end of a module's name, such as "
                "'q_proj'",
            )
        )


def read_object(text: str | bytes, where: str) -> dict[str, Any] | Problem:
    """Parses a configuration; what is wrong with it as JSON becomes a problem."""
    # As PEFT and vLLM read it; `json` alone would take other encodings of bytes too.
    content = text.encode(errors="surrogatepass") if isinstance(text, str) else text
    try:
        raw = parse_json(content, parts=_MAX_PARTS, values=_MAX_PARTS)
    except JsonTooLargeError as error:
        most = f"at most {error.most}"
        return Problem.at(Code.FILE_TOO_LARGE, where, "", error.found, most, verb="has")
    except ValueError as error:
        return Problem.at(
            Code.CONFIG_NOT_JSON,
            where,
            "",
            f"not valid JSON: {shown_name(str(error))}",
            "what PEFT's save_pretrained writes",
            hint="save the adapter again",
        )
    if not isinstance(raw, dict):
        return Problem.at(
            Code.CONFIG_NOT_JSON,
            where,
            "",
            f"a JSON {type(raw).__name__}",
            "an object with the keys 'r', 'lora_alpha' and 'target_modules'",
            verb="holds",
        )
    return raw
