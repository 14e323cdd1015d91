"""What a route may look at in a request, and how a routes file refers to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_multilora.errors import MultiLoRAError

LONGEST_VALUE = 512
"""Characters of a value that a request is led by: who or what it names has a short name."""

# Of languages. Browsers send up to a dozen; RFC 5646, section 4.4.1, expects tags of at most 35.
_LONGEST_RANGES, _MAX_RANGES, _LONGEST_TAG = 1024, 32, 64


class RequestError(MultiLoRAError):
    """A request for a route says nothing that the route can be led by."""


@dataclass(frozen=True)
class RequestFacts:
    """What a request says about itself: OpenAI's fields, and HTTP headers, names in lower case."""

    user: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FactSource:
    """A place in a request, a kind and a name: `user`, `language`, `metadata:NAME`, `header:NAME`.

    `text` is as the routes file has it.
    """

    text: str
    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> FactSource:
        """Reads a place.

        Raises:
            ValueError: The text names none.
        """
        kind, colon, name = (part.strip() for part in text.partition(":"))
        if (kind in ("user", "language") and not colon) or (
            kind in ("metadata", "header") and name
        ):
            return cls(text, kind, name.lower() if kind == "header" else name)
        raise ValueError("expected user, language, metadata:NAME or header:NAME")

    def value(self, facts: RequestFacts) -> str | None:
        """What the request says there; None where it says nothing.

        Raises:
            RequestError: It is too long.
        """
        if self.kind == "user":
            found: Any = facts.user
        elif self.kind == "header":
            found = facts.headers.get(self.name)
        elif self.kind == "metadata":
            found = facts.metadata.get(self.name)
        else:
            said = facts.metadata.get("language"), facts.headers.get("accept-language")
            # What is longer than anybody's list of languages counts up to there.
            texts = (text[:_LONGEST_RANGES].strip() for text in said if isinstance(text, str))
            return next(filter(None, texts), None)
        if isinstance(found, int) and not isinstance(found, bool):
            found = str(found)
        if not isinstance(found, str):
            return None
        if len(found) > LONGEST_VALUE:
            raise RequestError(
                f"its {self.text} has more than {LONGEST_VALUE} characters, which is the limit"
            )
        return found.strip() or None

    def case(self, written: str) -> str:
        """A value in the routes file as `requested` has it."""
        value = written.strip().lower()
        return value.replace("_", "-") if self.kind == "language" else value

    def requested(self, facts: RequestFacts) -> list[str]:
        """The cases that would suit the request, best first, in lower case; raises as `value`."""
        value = self.value(facts)
        if value is None:
            return []
        return _languages(value) if self.kind == "language" else [value.lower()]


def _languages(ranges: str) -> list[str]:
    """An `Accept-Language` value as language tags, best first, each before what it is a kind of.

    `fr-CH, en;q=0.5` becomes `fr-ch, fr, en`: the look-up of RFC 4647, section 3.4. Ranges that no
    language has, and those after the 32nd, are left out.
    """
    weighted = []
    for part in ranges.lower().split(",", _MAX_RANGES)[:_MAX_RANGES]:
        tag, *parameters = (piece.strip() for piece in part.split(";", 2))
        quality = next((_quality(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        tag = tag.replace("_", "-")
        if quality > 0 and _is_range(tag):
            weighted.append((quality, tag))
    weighted.sort(key=lambda pair: -pair[0])  # stable: equal ones stay in the client's order
    tags: dict[str, None] = {}
    for _, tag in weighted:
        while tag:
            tags[tag] = None
            tag = tag.rpartition("-")[0]
            if tag[-2:-1] == "-":  # a single letter only introduces what follows it
                tag = tag[:-2]
    return list(tags)


def _is_range(tag: str) -> bool:
    """Whether a text looks like a language: letters and digits, between hyphens."""
    return 0 < len(tag) <= _LONGEST_TAG and tag.isascii() and tag.replace("-", "").isalnum()


def _quality(text: str) -> float:
    """A weight from 0 to 1; 0 for what is none."""
    try:
        quality = float(text)
    except ValueError:
        return 0.0
    return quality if 0 <= quality <= 1 else 0.0
