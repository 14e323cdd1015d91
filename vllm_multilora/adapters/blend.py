"""Blends: several adapters with a weight each, served as one.

A blend computes the sum of its parts' products, each times its weight: the ranks stand side by
side, as in PEFT's `add_weighted_adapter` with `combination_type="cat"`. A blend has no files. Where
other adapters have a folder, it has a text, its `source`, which names the folders and weights of
its parts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
from blake3 import blake3

from vllm_multilora.adapters.problems import shown, shown_name
from vllm_multilora.errors import MultiLoRAError

BLEND_FIELD = "lora_blend"
"""Field of request bodies: a weight for each adapter of a blend."""

MAX_PARTS = 8
MAX_WEIGHT = 100.0
"""Magnitude of a weight; useful ones are about 1."""

FIRST_NUMBER = 1 << 53
"""Smallest number that a blend can have; other adapters have lower ones."""

_NUMBERS_END = 1 << 63
_PREFIX = "blend:"
_EXPECTED = 'a weight for each adapter, such as {"style": 0.7, "domain": 0.5}'
# What separates parts in a blend's name, in the names of its parts.
_QUOTED = str.maketrans({"%": "%25", "*": "%2A", "+": "%2B"})
_Wire = list[tuple[int, str, str, float]]


class BlendError(MultiLoRAError, ValueError):
    """What was asked for is no blend."""


@dataclass(frozen=True)
class BlendPart:
    """One adapter of a blend; its number is that of the version that was meant."""

    number: int
    name: str
    path: str
    weight: float


@dataclass(frozen=True)
class Blend:
    """Several adapters as one, each once: by name, in which order their ranks stand."""

    parts: tuple[BlendPart, ...]

    @classmethod
    def of(cls, parts: Iterable[BlendPart]) -> Blend:
        """The blend of some adapters, in whatever order; raises `BlendError` if it is none."""
        found = sorted(parts, key=lambda part: part.name)
        weights_in({part.name: part.weight for part in found})
        for one, next_one in pairwise(found):
            if one.name == next_one.name:
                raise BlendError(f"found {one.name!r} twice, expected every adapter once")
        return cls(tuple(replace(part, weight=float(part.weight) + 0.0) for part in found))

    @classmethod
    def read(cls, source: str) -> Blend | None:
        """The blend that a `source` names; None for a folder's path; raises `BlendError`."""
        if not is_blend(source):
            return None
        try:
            found = msgspec.json.decode(source.removeprefix(_PREFIX), type=_Wire)
        except msgspec.MsgspecError as error:
            raise BlendError(
                f"{shown_name(source)} is not the source of a blend: {error}"
            ) from None
        return cls.of(BlendPart(*part) for part in found)

    @cached_property
    def source(self) -> str:
        """The text that stands where other adapters have a folder."""
        wire: _Wire = [(part.number, part.name, part.path, part.weight) for part in self.parts]
        return _PREFIX + json.dumps(wire, separators=(",", ":"))

    @cached_property
    def name(self) -> str:
        """What people read: `0.5*domain+0.7*style`."""
        return name_of((part.name, part.weight) for part in self.parts)

    @cached_property
    def number(self) -> int:
        """Its number (`lora_int_id`): every server comes to the same for the same versions."""
        text = repr([(part.number, part.weight) for part in self.parts]).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return FIRST_NUMBER + int.from_bytes(digest) % (_NUMBERS_END - FIRST_NUMBER)

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(part.number for part in self.parts)

    def at(self, located: Callable[[str], str]) -> Blend:
        """The same with the folders that a function makes of its parts'."""
        return Blend(tuple(replace(part, path=located(part.path)) for part in self.parts))

    def digest(self, digests: Sequence[str]) -> str:
        """64 hexadecimal digits that tell its weights from others', from its parts' digests."""
        return blake3(b"vllm-multilora blend 1\n" + self._with_weights(digests)).hexdigest()

    def version(self, versions: Sequence[str]) -> str:
        """What tells one state of its parts' files, in their order, from another."""
        return "blend-" + blake3(self._with_weights(versions)).hexdigest()

    def _with_weights(self, texts: Sequence[str]) -> bytes:
        pairs = [(text, part.weight) for text, part in zip(texts, self.parts, strict=True)]
        return json.dumps(pairs).encode()


def name_of(weights: Iterable[tuple[str, float]]) -> str:
    """What people call the blend of adapters with these names and weights."""
    return "+".join(
        f"{repr(weight).removesuffix('.0')}*{name.translate(_QUOTED)}"
        for name, weight in sorted(weights)
    )


def is_blend(source: str | None) -> bool:
    """Whether what an adapter has for a folder, if it has any, is the source of a blend."""
    return source is not None and source.startswith(_PREFIX)


def folders_of(source: str) -> tuple[str, ...]:
    """The folders that an adapter is read from: its own, or those of its parts."""
    blend = Blend.read(source)
    return (source,) if blend is None else tuple(part.path for part in blend.parts)


def title(source: str) -> str:
    """What messages call an adapter by what it is read from: its folder, or a blend's name."""
    blend = Blend.read(source)
    return source if blend is None else blend.name


def weights_in(value: Any) -> dict[str, float]:
    """The weights of adapters by name, as somebody has written them; raises `BlendError`."""
    if not isinstance(value, dict):
        raise BlendError(f"found {shown(value)}, expected {_EXPECTED}")
    if not 1 <= len(value) <= MAX_PARTS:
        raise BlendError(f"found {len(value)} adapters, expected 1 to {MAX_PARTS}: {_EXPECTED}")
    return {name: _weight(name, weight) for name, weight in value.items()}


def _weight(name: Any, value: Any) -> float:
    if not isinstance(name, str) or not name:
        raise BlendError(f"found {shown(name)} for an adapter's name, expected {_EXPECTED}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_WEIGHT:  # nor NaN
        raise BlendError(
            f"found {shown(value)} for {shown(name)}, expected a weight: a number from "
            f"-{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        )
    return float(value) + 0.0  # there is one zero
