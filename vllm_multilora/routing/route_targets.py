"""Where a route leads: to an adapter or a blend, to one of several in shares, or by a value."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from vllm_multilora.adapters.blend import name_of
from vllm_multilora.routing.request_facts import FactSource, RequestError, RequestFacts
from vllm_multilora.wording import listed

MAX_WEIGHT = 1_000_000_000
"""Largest weight of an adapter: the sum of all weights stays a finite number."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_HASHES = 2.0**64
_MAX_NAMED = 20
_MAX_SHOWN = 80

Turns = Counter[str]
"""How many requests each split has divided that named no customer."""


@dataclass(frozen=True)
class Named:
    """An adapter, or the base model by a name that it is served under.

    Of each target, `candidates` says which names and blends may answer a request: the first that is
    available does. It raises `RequestError` where there is no answer for such a request. `names`
    are all that may answer some request.
    """

    name: str

    def candidates(self, facts: RequestFacts, turns: Turns) -> tuple[str, ...]:
        return (self.name,)

    def names(self) -> Iterator[str]:
        yield self.name


@dataclass(frozen=True)
class Blended:
    """Several adapters as one: each one's name and the weight of what it computes."""

    weights: tuple[tuple[str, float], ...]

    def candidates(self, facts: RequestFacts, turns: Turns) -> tuple[Candidate, ...]:
        return (self,)

    def names(self) -> Iterator[str]:
        for name, _ in self.weights:
            yield name

    def __str__(self) -> str:
        return name_of(self.weights)


Candidate: TypeAlias = str | Blended
"""What may answer a request: an adapter, or the base model, by its name; or a blend."""


@dataclass(frozen=True)
class Split:
    """Several adapters in shares.

    Attributes:
        place: The split's own place in the routes file; splits at different places divide
            customers independently.
        weights: Of each name, relative to each other.
        sticky: What says who the customer is. Where a request does not, requests take turns.
    """

    place: str
    weights: Mapping[str, float]
    sticky: FactSource

    def candidates(self, facts: RequestFacts, turns: Turns) -> tuple[str, ...]:
        customer = self.sticky.value(facts)
        if customer is not None:
            return (sticky_choice(customer, self.weights, self.place),)
        turn = turns[self.place]
        turns[self.place] += 1
        return (turn_choice(turn, self.weights),)

    def names(self) -> Iterator[str]:
        yield from self.weights


@dataclass(frozen=True)
class Cases:
    """One target for each value, in lower case, of something that the request says.

    Attributes:
        place: The choice's place in the routes file.
        default: For all other requests, those without value among them.
    """

    place: str
    by: FactSource
    cases: Mapping[str, Target]
    default: Target | None

    def candidates(self, facts: RequestFacts, turns: Turns) -> tuple[Candidate, ...]:
        for value in self.by.requested(facts):
            if value in self.cases:
                return self.cases[value].candidates(facts, turns)
        if self.default is not None:
            return self.default.candidates(facts, turns)
        raise RequestError(
            f"{self.place} chooses by {self.by.text} and has no default: found "
            f"{_shown(self.by.value(facts))}, expected one of {listed(self.cases, _MAX_NAMED)}"
        )

    def names(self) -> Iterator[str]:
        for target in self.cases.values():
            yield from target.names()
        if self.default is not None:
            yield from self.default.names()


Target: TypeAlias = "Named | Blended | Split | Cases | WithFallback"
"""Where a request may be led."""


def _shown(value: str | None) -> str:
    if not value:
        return "no value"
    shown = repr(value)
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


@dataclass(frozen=True)
class WithFallback:
    """A target, and who answers where it is unavailable."""

    target: Target
    fallback: tuple[str, ...]

    def candidates(self, facts: RequestFacts, turns: Turns) -> tuple[Candidate, ...]:
        return tuple(dict.fromkeys((*self.target.candidates(facts, turns), *self.fallback)))

    def names(self) -> Iterator[str]:
        yield from self.target.names()
        yield from self.fallback


def sticky_choice(key: str, weights: Mapping[str, float], salt: str = "") -> str:
    """The adapter that a customer has, always the same for the same weights.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; the weights as by Schindelhauer and
    Schomaker 2005): every adapter draws a number for the customer from an exponential
    distribution with its weight as rate, and the least wins. A weight that changes moves
    customers to or from its own adapter only, and as few as the new shares ask for. Under different
    salts, customers are divided independently. At least one weight is above 0.
    """

    def draw(adapter: str) -> float:
        text = f"{salt}\0{adapter}\0{key}".encode("utf-8", "surrogatepass")
        number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())
        return -math.log((number + 0.5) / _HASHES) / weights[adapter]

    return min((name for name, weight in weights.items() if weight > 0), key=draw)


def turn_choice(turn: int, weights: Mapping[str, float]) -> str:
    """The adapter of the `turn`-th request of nobody in particular.

    Multiples of the golden ratio fill an interval more evenly than random numbers do, from any
    turn on (Weyl's equidistribution): after 100 turns each adapter has its share within a few
    requests, and neighbouring requests are spread over the adapters. Some weight is above 0.
    """
    rest = (turn * _GOLDEN) % 1.0 * sum(weights.values())
    chosen = ""
    for name, weight in weights.items():
        if weight > 0:
            chosen = name
            rest -= weight
            if rest < 0:
                break
    return chosen
