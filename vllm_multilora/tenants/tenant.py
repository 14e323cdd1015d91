"""What a tenant may use, and how much of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

MAX_WEIGHT = 1_000_000_000
"""Sums of weights, and what is divided by them, stay far from what a float cannot hold."""

MEDIA = "media"
GRAMMARS = "grammars"

ALLOWABLE: Mapping[str, str] = {
    MEDIA: "images, recordings and videos in requests, and `/v1/audio`",
    GRAMMARS: "structured outputs, response formats and tools",
}
"""What a tenant may only send if the tenants file says `allow`, by the word for it."""


@dataclass(frozen=True)
class TenantLimits:
    """How much a tenant may use at once; None is no limit.

    Attributes:
        running: Most calls that are worked for at the same time; others wait for their turn.
        waiting: Most calls that wait for their turn; others are refused.
        tokens_per_minute: Prompt and generated tokens, averaged: a minute's worth may be used at
            once after a pause.
        adapters: Most different adapters in use at the same time.
        resident: Most adapters that stay in host memory: for one more, one of the tenant's own
            leaves. Those that its requests wait for do not, so it may be exceeded for a while.
        answers: Most answers at a time that its calls want together; a call may want many.
    """

    running: int | None = None
    waiting: int | None = None
    tokens_per_minute: float | None = None
    adapters: int | None = None
    resident: int | None = None
    answers: int | None = None

    def divided(self, parts: int) -> TenantLimits:
        """The limits of one of several API servers: equal parts, counts rounded up.

        Adapters are not divided: every server may meet all of them. Host memory is one for all.
        """

        def part(count: int | None) -> int | None:
            return None if count is None else -(-count // parts)

        tokens = self.tokens_per_minute
        return replace(
            self,
            running=part(self.running),
            waiting=part(self.waiting),
            answers=part(self.answers),
            tokens_per_minute=None if tokens is None else tokens / parts,
        )


@dataclass(frozen=True)
class AllowedNames:
    """Names that somebody may use, as the tenants file has them: whole, or beginnings with `*`."""

    patterns: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._whole or name.startswith(self._beginnings))

    @cached_property
    def _whole(self) -> frozenset[str]:
        return frozenset(self.patterns)  # what ends in * begins with what is before that, too

    @cached_property
    def _beginnings(self) -> tuple[str, ...]:
        return tuple(pattern[:-1] for pattern in self.patterns if pattern.endswith("*"))


@dataclass(frozen=True)
class Tenant:
    """One tenant.

    Attributes:
        name: Safe as a label in metrics.
        adapters: What it may use and see.
        routes: Likewise. Who may use a route may use what the route leads to.
        base_model: Whether it may use the base model without an adapter.
        weight: Its share of what tenants compete for, relative to others'.
        limits: How much it may use at once.
        allow: Words of `ALLOWABLE`.
    """

    name: str
    adapters: AllowedNames = AllowedNames()
    routes: AllowedNames = AllowedNames()
    base_model: bool = False
    weight: float = 1.0
    limits: TenantLimits = field(default_factory=TenantLimits)
    allow: frozenset[str] = frozenset()

    def mentions(self, model: object) -> bool:
        """Whether it may use a model of a name, be it an adapter's or be it a route's."""
        return model in self.adapters or model in self.routes


@dataclass(frozen=True)
class Tenants:
    """The tenants of one file, and their names by the digests of their keys.

    Attributes:
        cache_salt: What keeps cached prefixes apart; None leaves it to the server.
    """

    by_name: Mapping[str, Tenant]
    keys: Mapping[bytes, str]
    cache_salt: str | None = None


def is_weight(value: object) -> bool:
    """Whether a value can be a weight: a number above 0, up to `MAX_WEIGHT`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= MAX_WEIGHT  # type: ignore[operator]
