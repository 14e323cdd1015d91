"""The native CPU backend: calls the C kernels of `segment_gemm.c` on torch tensors.

Each call fills one `struct lora_call` with addresses, strides and sizes, and runs the whole
product (both halves, every slice, every adapter) on PyTorch's own OpenMP threads.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from functools import lru_cache

import torch

from multilora_kernels.native.compiler import NativeUnavailableError, load_library
from multilora_kernels.plan import PlanLayout

__all__ = [
    "NativeUnavailableError",
    "is_available",
    "load_library",
    "lora_expand",
    "lora_linear",
    "lora_shrink",
]

MAX_SLICES = 16
_LINEAR, _SHRINK, _EXPAND = range(3)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_HEAD = struct.Struct("=23qd")
_SLICE = struct.Struct("=10q")
_INT_BYTES = 4


class _Scratch(threading.local):
    """A thread's call structure and float32 scratch memory, which only ever grows."""

    def __init__(self) -> None:
        self.call = ctypes.create_string_buffer(_HEAD.size + MAX_SLICES * _SLICE.size)
        self.floats = torch.empty(0)

    def address(self, floats: int) -> int:
        if self.floats.numel() < floats:
            self.floats = torch.empty(floats)
        return self.floats.data_ptr()


_scratch = _Scratch()


def is_available() -> bool:
    """Whether the C kernels are built, or can be built, here; builds them."""
    try:
        load_library()
    except NativeUnavailableError:
        return False
    return True


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    offset: int,
    add_inputs: bool,
) -> None:
    """See `multilora_kernels.lora_linear`; arguments are valid, tensors are on the CPU."""
    slices = []
    for a, b in zip(lora_a, lora_b, strict=True):
        cols = b.size(-2)
        slices.append((*_weights(a), *_weights(b), cols, offset, 0, 0))
        offset += cols
    weights = lora_a[0]
    _run(
        _LINEAR,
        slices,
        x=x,
        y=y,
        k=weights.size(-1),
        max_rank=weights.size(-2),
        weight_dtype=weights.dtype,
        ranks=ranks,
        plan=plan,
        layout=layout,
        scale=scale,
        overwrite=not add_inputs,
    )


def lora_shrink(
    h: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float,
) -> None:
    """See `multilora_kernels.lora_shrink`; arguments are valid, tensors are on the CPU."""
    address, step = h.data_ptr(), h.stride(0) * h.element_size()
    slices = [
        (*_weights(a), 0, 0, 0, 0, 0, address + i * step, h.stride(1)) for i, a in enumerate(lora_a)
    ]
    weights = lora_a[0]
    _run(
        _SHRINK,
        slices,
        x=x,
        h=h,
        k=weights.size(-1),
        max_rank=weights.size(-2),
        weight_dtype=weights.dtype,
        ranks=ranks,
        plan=plan,
        layout=layout,
        scale=scale,
    )


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
) -> None:
    """See `multilora_kernels.lora_expand`; arguments are valid, tensors are on the CPU."""
    address, step = h.data_ptr(), h.stride(0) * h.element_size()
    slices = []
    for i, b in enumerate(lora_b):
        cols = b.size(-2)
        slices.append((0, 0, 0, *_weights(b), cols, offset, address + i * step, h.stride(1)))
        offset += cols
    _run(
        _EXPAND,
        slices,
        y=y,
        h=h,
        k=0,
        max_rank=h.size(-1),
        weight_dtype=lora_b[0].dtype,
        ranks=ranks,
        plan=plan,
        layout=layout,
        overwrite=not add_inputs,
    )


@lru_cache
def _scratch_floats(k: int, slices: int, max_rank: int) -> int:
    function = load_library().multilora_scratch_floats
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 3
    return function(k, slices, max_rank)


def _weights(stacked: torch.Tensor) -> tuple[int, int, int]:
    return stacked.data_ptr(), stacked.stride(0), stacked.stride(-2)


def _run(
    mode: int,
    slices: list[tuple[int, ...]],
    *,
    x: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    h: torch.Tensor | None = None,
    k: int,
    max_rank: int,
    weight_dtype: torch.dtype,
    ranks: torch.Tensor,
    plan: torch.Tensor,
    layout: PlanLayout,
    scale: float = 1.0,
    overwrite: bool = False,
) -> None:
    tokens = x.size(0) if x is not None else h.size(1) if h is not None else 0
    base = plan.data_ptr()
    call = _scratch.call
    _HEAD.pack_into(
        call,
        0,
        mode,
        torch.get_num_threads(),
        len(slices),
        *((x.data_ptr(), x.stride(0), _DTYPES[x.dtype]) if x is not None else (0, 0, 0)),
        k,
        *((y.data_ptr(), y.stride(0), _DTYPES[y.dtype]) if y is not None else (0, 0, 0)),
        _DTYPES[h.dtype] if h is not None else 0,
        max_rank,
        _DTYPES[weight_dtype],
        tokens,
        overwrite,
        base,
        base + layout.order.start * _INT_BYTES,
        base + layout.tile_slot.start * _INT_BYTES,
        base + layout.tile_start.start * _INT_BYTES,
        base + layout.tile_length.start * _INT_BYTES,
        ranks.data_ptr(),
        ranks.stride(0),
        _scratch.address(_scratch_floats(k, len(slices), max_rank)),
        scale,
    )
    for i, values in enumerate(slices):
        _SLICE.pack_into(call, _HEAD.size + i * _SLICE.size, *values)
    load_library().multilora_run(call)
