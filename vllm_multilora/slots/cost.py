"""What bringing an adapter back from disk costs, as policies weigh it."""

from __future__ import annotations

from vllm_multilora.slots.budget import MIB

FIXED_PART_BYTES = 8 * MIB
"""What is read in the time that a load takes whatever its size: opening, parsing, checking.

A constant of the right order: for adapters of 448 tensors, 10 to 160 MiB, in the page cache of a
shared two-core machine, it came to between 6 and 15 MiB. It is not measured where it is used,
because times differ between ranks, and so would their victims.
"""


def reload_cost(size: int) -> float:
    """Cost of loading `size` bytes, in loads of an empty adapter."""
    return 1.0 + size / FIXED_PART_BYTES
