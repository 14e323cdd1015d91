"""Large host tensors in huge pages, where the system gives them to who asks (`madvise`).

The slots on a CPU are tens to thousands of megabytes that are read from end to end. In pages of
4 KiB that takes a look-up of the page table every 4 KiB, which is gone in pages of 2 MiB.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

HUGE_PAGE = 2 << 20
_ALIGNMENT = 64


def zeros(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """A contiguous, zeroed tensor of each shape on the CPU, one after the other in memory.

    They lie in one mapping, since most are smaller than a huge page; it is returned to the system
    with the last of them. Each has a storage of its own.
    """
    counts = [math.prod(shape) for shape in shapes]
    sizes = [_round_up(count * dtype.itemsize, _ALIGNMENT) for count in counts]
    if sum(sizes) < HUGE_PAGE:
        return [torch.zeros(*shape, dtype=dtype) for shape in shapes]
    memory, start = _map(sum(sizes))
    tensors = []
    for shape, count, size in zip(shapes, counts, sizes, strict=True):
        if count:
            tensor = torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(*shape)
            # Written once, so that memory that is not there is missed now and not while serving.
            tensors.append(tensor.zero_())
        else:
            tensors.append(torch.zeros(*shape, dtype=dtype))
        start += size
    return tensors


def _map(size: int) -> tuple[mmap.mmap, int]:
    """New memory that may lie in huge pages, and where in it `size` bytes begin with one."""
    # Private: what processes may share never lies in huge pages as Linux is configured.
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them; small pages do as well
            return memory, 0
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return memory, -address % HUGE_PAGE


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to
