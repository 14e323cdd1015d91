"""Synthetic traffic from a seed: the same arguments give the same trace on every machine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.simulation.traces import Trace

_LIMIT = 10_000_000  # all requests and adapters are in memory
_MAX_EXPONENT = 10
"""With which the second adapter has a thousandth of the first one's requests."""


@dataclass(frozen=True)
class Traffic:
    """What the made-up requests are like.

    Attributes:
        requests: Number of requests.
        adapters: Number of adapters; adapter k of popularity rank k is asked for in proportion
            to 1 / k ** `zipf_exponent`.
        zipf_exponent: 0 is uniform, 10 the most; traffic over many tenants is often near 1.
        seed: Of the random numbers.
        burst_length: Mean requests in a burst (`bursts`).
        scan_every: Requests between two scans (`scan`).

    Raises:
        ConfigError: A number is out of range.
    """

    requests: int = 20_000
    adapters: int = 200
    zipf_exponent: float = 1.0
    seed: int = 0
    burst_length: int = 50
    scan_every: int = 1_000

    def __post_init__(self) -> None:
        for name in ("requests", "adapters", "burst_length", "scan_every"):
            if not 1 <= getattr(self, name) <= _LIMIT:
                raise ConfigError(
                    f"{name} must be at least 1 and at most {_LIMIT}, got {getattr(self, name)}"
                )
        if not 0 <= self.zipf_exponent <= _MAX_EXPONENT:
            raise ConfigError(
                f"zipf_exponent must be 0 or more, at most {_MAX_EXPONENT}, got "
                f"{self.zipf_exponent}"
            )

    @property
    def popularity(self) -> list[float]:
        """Weight of each adapter, most popular first."""
        return [1 / rank**self.zipf_exponent for rank in range(1, self.adapters + 1)]


def _zipf(traffic: Traffic, dice: random.Random) -> Iterator[int]:
    """Independent draws; a policy can learn the popularity and nothing else."""
    return iter(
        dice.choices(
            range(traffic.adapters),
            cum_weights=list(accumulate(traffic.popularity)),
            k=traffic.requests,
        )
    )


BURST_SHARE = 0.5


def _bursts(traffic: Traffic, dice: random.Random) -> Iterator[int]:
    """Half of the requests are one tenant's, any tenant's, for a while; the others are Zipf."""
    burst = dice.randrange(traffic.adapters)
    for adapter in _zipf(traffic, dice):
        if dice.random() < 1 / traffic.burst_length:
            burst = dice.randrange(traffic.adapters)
        yield burst if dice.random() < BURST_SHARE else adapter


DAYS = 3
HOURS = 24 * DAYS


def _daily(traffic: Traffic, dice: random.Random) -> Iterator[int]:
    """Three days of tenants in all time zones, each busy in its half of the day."""
    phases = [dice.random() for _ in range(traffic.adapters)]
    done = 0
    for hour in range(HOURS):
        busy = [max(0.0, math.sin(2 * math.pi * (hour / 24 + phase))) + 0.02 for phase in phases]
        weights = [share * day for share, day in zip(traffic.popularity, busy, strict=True)]
        until = traffic.requests * (hour + 1) // HOURS
        yield from dice.choices(range(traffic.adapters), weights=weights, k=until - done)
        done = until


def _scan(traffic: Traffic, dice: random.Random) -> Iterator[int]:
    """Zipf, and now and then one request to every adapter in turn, as nightly jobs make them."""
    popular = _zipf(traffic, dice)
    emitted = 0
    while emitted < traffic.requests:
        for _ in range(min(traffic.scan_every, traffic.requests - emitted)):
            yield next(popular)
            emitted += 1
        for adapter in range(min(traffic.adapters, traffic.requests - emitted)):
            yield adapter
            emitted += 1


_KINDS: dict[str, Callable[[Traffic, random.Random], Iterator[int]]] = {
    "zipf": _zipf,
    "bursts": _bursts,
    "daily": _daily,
    "scan": _scan,
}
KINDS = tuple(_KINDS)


def synthetic_trace(kind: str, traffic: Traffic) -> Trace:
    """A trace of one of `KINDS`; adapters are called `adapter-0001` and so on by popularity."""
    dice = random.Random(traffic.seed)
    names = [f"adapter-{rank:04d}" for rank in range(1, traffic.adapters + 1)]
    return Trace(tuple(names[adapter] for adapter in _KINDS[kind](traffic, dice)))


def kinds_help() -> str:
    """One clause for each kind."""
    clauses = ((kind, (make.__doc__ or "").rstrip(".")) for kind, make in _KINDS.items())
    return "; ".join(f"{kind}: {clause[:1].lower()}{clause[1:]}" for kind, clause in clauses)
