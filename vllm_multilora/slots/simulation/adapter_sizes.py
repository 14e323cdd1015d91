"""Sizes for the adapters of a trace that does not state them."""

from __future__ import annotations

import random
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vllm_multilora.documents import read_file, read_json
from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.budget import GIB, MIB
from vllm_multilora.slots.simulation.traces import LIMIT

DEFAULT_MIB_PER_RANK = 5.0
"""An adapter of all linear layers of an 8-billion Llama 3 in 16 bits: 2,621,440 weights a rank."""

_UNITS = {"MiB": MIB, "GiB": GIB}


def size_in(unit: Literal["MiB", "GiB"], count: float, what: str) -> int:
    """Bytes in that many of a unit.

    Raises:
        ConfigError: They are less than a byte, or too many; the message names `what`.
    """
    size = count * _UNITS[unit]
    if not 1 <= size < LIMIT:  # nor NaN
        raise ConfigError(f"{what} must be a positive number of {unit}, got {count:g}")
    return round(size)


def read_sizes(path: Path) -> dict[str, int]:
    """Bytes by adapter from a JSON object of MiB, as `{"acme": 80, "globex": 320}`.

    Raises:
        ConfigError: The file cannot be read, or a size in it is wrong.
    """
    table = read_file(path, read_json, "sizes")
    if not isinstance(table, dict):
        raise ConfigError(f'{path}: expected an object such as {{"acme": 80}}, in MiB')
    for adapter, mib in table.items():
        if isinstance(mib, bool) or not isinstance(mib, int | float) or mib <= 0:
            raise ConfigError(f"{path}: adapter {adapter!r} must have a positive MiB, got {mib!r}")
    return {
        adapter: size_in("MiB", mib, f"{path}: the size of {adapter!r}")
        for adapter, mib in table.items()
    }


def parse_rank_mix(text: str) -> dict[int, float]:
    """Weights by rank from text such as `8=70,16=20,64=10`.

    Raises:
        ConfigError: The text is no such list.
    """
    mix: dict[int, float] = {}
    for part in text.split(","):
        rank, _, weight = part.partition("=")
        try:
            mix[int(rank)] = float(weight)
        except ValueError:
            raise ConfigError(
                f"a rank mix must be like 8=70,64=30 (rank=weight), got {part!r} in {text!r}"
            ) from None
    if not all(0 < number < LIMIT for number in (*mix, *mix.values())):
        raise ConfigError(
            f"a rank mix must have positive ranks and weights below 2^63, got {reprlib.repr(text)}"
        )
    return mix


def sizes_by_rank(
    adapters: Sequence[str], mix: Mapping[int, float], mib_per_rank: float, seed: int
) -> dict[str, int]:
    """Gives every adapter a rank of the mix at random, and with it a size in bytes."""
    ranks = random.Random(seed).choices(list(mix), weights=list(mix.values()), k=len(adapters))
    return {
        adapter: size_in("MiB", rank * mib_per_rank, "the size of an adapter")
        for adapter, rank in zip(adapters, ranks, strict=True)
    }
