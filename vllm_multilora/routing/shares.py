"""Dividing requests among adapters in given shares."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

MOST_WEIGHT = 1_000_000_000
"""Largest weight of an adapter: the sum of all weights stays a finite number."""

_GOLDEN = (math.sqrt(5) - 1) / 2
_HASHES = 2.0**64


def sticky_choice(key: str, weights: Mapping[str, float], salt: str = "") -> str:
    """The adapter that a customer has, always the same for the same weights.

    Weighted rendezvous hashing (Thaler and Ravishankar 1998; the weights as by Schindelhauer and
    Schomaker 2005): every adapter draws a number for the customer from an exponential
    distribution with its weight as rate, and the least wins. A weight that changes moves
    customers to or from its own adapter only, and as few as the new shares ask for.

    Args:
        key: Who the customer is.
        weights: Of each adapter; at least one is above 0.
        salt: Customers are divided independently under different salts.
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
    requests, and neighbouring requests are spread over the adapters.

    Args:
        turn: Counts the requests.
        weights: Of each adapter; at least one is above 0.
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
