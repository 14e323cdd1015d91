"""What a route may look at in a request, and how a routes file names it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RequestFacts:
    """What a request says about itself.

    Attributes:
        user: OpenAI's `user` field.
        metadata: OpenAI's `metadata` field.
        headers: HTTP headers, names in lower case.
    """

    user: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A place in a request: `user`, `metadata:NAME`, `header:NAME` or `language`.

    Attributes:
        text: The place, as the routes file has it.
        kind: What comes before the colon.
        name: What comes after it.
    """

    text: str
    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Source:
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
        """What the request says there; None where it says nothing."""
        if self.kind == "user":
            found: Any = facts.user
        elif self.kind == "header":
            found = facts.headers.get(self.name)
        elif self.kind == "metadata":
            found = facts.metadata.get(self.name)
        else:
            found = facts.metadata.get("language") or facts.headers.get("accept-language")
        if isinstance(found, int) and not isinstance(found, bool):
            found = str(found)
        return (found.strip() or None) if isinstance(found, str) else None

    def wanted(self, facts: RequestFacts) -> list[str]:
        """The cases that would suit the request, best first, in lower case."""
        value = self.value(facts)
        if value is None:
            return []
        return _languages(value) if self.kind == "language" else [value.lower()]


def _languages(ranges: str) -> list[str]:
    """An `Accept-Language` value as language tags, best first, each before what it is a kind of.

    `fr-CH, en;q=0.5` becomes `fr-ch, fr, en`: the look-up of RFC 4647, section 3.4.
    """
    weighted = []
    for part in ranges.lower().split(","):
        tag, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((_number(p[2:]) for p in parameters if p.startswith("q=")), 1.0)
        if tag and tag != "*" and quality > 0:
            weighted.append((quality, tag.replace("_", "-")))
    weighted.sort(key=lambda pair: -pair[0])  # stable: equal ones stay in the client's order
    tags: dict[str, None] = {}
    for _, tag in weighted:
        while tag:
            tags[tag] = None
            tag = tag.rpartition("-")[0]
    return list(tags)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
