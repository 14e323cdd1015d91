"""The facts that decide a configuration, and what a configuration is."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MIN_BLOCK = 16
"""The shortest side of a tensor-core product of 16-bit values in Triton."""


@dataclass(frozen=True)
class Workload:
    """One half of a LoRA product, as far as a configuration may depend on it.

    Attributes:
        tokens: Rows of the activations, rounded up to a power of two, so that the many token
            counts of a server share few configurations.
        width: The half's long side: columns of x (shrink), or of y over all slices (expand).
        slices: Slices of the fused layer.
        max_rank: Columns reserved for the rank.
        item_size: Bytes of the wider one of activations and weights.
        architecture: Name of the device's table.
        processors: Streaming multiprocessors of the device.
    """

    tokens: int
    width: int
    slices: int
    max_rank: int
    item_size: int
    architecture: str
    processors: int


@dataclass(frozen=True)
class _Config:
    """Values shared by both halves; every block is a power of two.

    Attributes:
        block_m: Tokens that a program takes at a time.
        block_r: The widest block of ranks; narrower bodies down to 16 come with it.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline over the inner loop.
        per_processor: Programs that are started for each multiprocessor; no more than it holds at
            once, or the rest would only wait for their turn.
    """

    block_m: int
    block_r: int
    num_warps: int
    num_stages: int
    per_processor: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.type == "bool":
                if type(value) is not bool:
                    raise ValueError(f"{field.name} must be true or false, got {value!r}")
                continue
            low, high, power_of_two = _BOUNDS[field.name]
            kind = "a power of two" if power_of_two else "an integer"
            if (
                type(value) is not int
                or not low <= value <= high
                or (power_of_two and value & (value - 1))
            ):
                raise ValueError(f"{field.name} must be {kind} from {low} to {high}, got {value!r}")


@dataclass(frozen=True)
class ShrinkConfig(_Config):
    """Blocks of the first half.

    Attributes:
        block_k: Columns of x in one step of the inner loop.
        split_k: Parts that K is cut into, each summed by its own program.
        vector_rows: Blocks of up to so many tokens are multiplied without tensor cores.
        early: Whether programs are placed while the kernel before ends, where the device can.
    """

    block_k: int
    split_k: int
    vector_rows: int = 0
    early: bool = False


@dataclass(frozen=True)
class ExpandConfig(_Config):
    """Blocks of the second half.

    Attributes:
        block_n: Columns of y that a program computes at a time.
    """

    block_n: int


_BOUNDS = {
    "block_m": (MIN_BLOCK, 256, True),
    "block_n": (MIN_BLOCK, 512, True),
    "block_k": (MIN_BLOCK, 512, True),
    "block_r": (MIN_BLOCK, 256, True),
    "split_k": (1, 64, False),
    "vector_rows": (0, 4, False),
    "num_warps": (1, 16, True),
    "num_stages": (1, 8, False),
    "per_processor": (1, 32, False),
}


def power_of_two_up(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def power_of_two_down(value: int) -> int:
    """The largest power of two that is not above `value`, at least 1."""
    return 1 << max(0, value.bit_length() - 1)
