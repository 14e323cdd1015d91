"""Calls the C kernels of `segment_gemm.c` on torch tensors.

A `Call` is one `struct lora_call`: what the weights fix is packed into it once, the addresses
of the activations on every run, and the rest of a batch's description only if it differs from
the last one's. Each run does the whole product (every slice, every adapter) on PyTorch's own
OpenMP threads.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch

from multilora_kernels.factors import OutputFactors
from multilora_kernels.native.compiler import check_size, load_library
from multilora_kernels.plan import PlanLayout

MAX_SLICES = 16
LINEAR, SHRINK, EXPAND = range(3)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What C calls types of elements: `enum dtype`."""

_INT_BYTES = 4

# struct lora_call: what weights fix, the addresses of a batch's tensors and the rest of its
# description, then the slices.
_FIXED = struct.Struct("=15qd")
_ADDRESSES = struct.Struct("=3q")
_BATCH = struct.Struct("=16q")
_SLICE = struct.Struct("=9q")
_BATCH_AT = _FIXED.size + _ADDRESSES.size
_SLICES_AT = _BATCH_AT + _BATCH.size


@lru_cache(maxsize=1)
def _library() -> ctypes.PyDLL:
    library = load_library()
    check_size(library, "multilora_call_bytes", _SLICES_AT + MAX_SLICES * _SLICE.size)
    library.multilora_run.argtypes, library.multilora_run.restype = [ctypes.c_void_p], None
    library.multilora_scratch_floats.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.multilora_scratch_floats.restype = ctypes.c_int64
    return library


class _Scratch(threading.local):
    """A thread's float32 scratch memory, which only ever grows."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def memory(self, floats: int) -> torch.Tensor:
        if self._memory.numel() < floats:
            # Whatever the caller's defaults are, which may be a model's: C writes as many floats.
            self._memory = torch.empty(floats, dtype=torch.float32, device="cpu")
        return self._memory


_scratch = _Scratch()


class Call:
    """A product with fixed weights, to be run on many batches; not for two threads at once.

    Args:
        mode: `LINEAR`, `SHRINK` (only lora_a) or `EXPAND` (only lora_b).
        lora_a: As for `multilora_kernels.lora_linear`, valid; empty for `EXPAND`.
        lora_b: Likewise; empty for `SHRINK`.
        ranks: int32 [slices, slots].
        layout: The layout of the plans to come.
        scale: Factor of every product.
        overwrite: Whether y's span is overwritten rather than added to.
        factors: Of y's columns, or None.
    """

    def __init__(
        self,
        mode: int,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        *,
        scale: float = 1.0,
        overwrite: bool = False,
        factors: OutputFactors | None = None,
    ) -> None:
        self._keep_alive = (tuple(lora_a), tuple(lora_b), ranks, factors)
        weights = lora_a or lora_b
        slices = len(weights)
        if slices > MAX_SLICES:
            raise ValueError(f"a layer may have at most {MAX_SLICES} slices, found {slices}")
        k = lora_a[0].size(-1) if lora_a else 0
        max_rank = lora_a[0].size(-2) if lora_a else lora_b[0].size(-1)
        self._struct = ctypes.create_string_buffer(_SLICES_AT + MAX_SLICES * _SLICE.size)
        self._address = ctypes.addressof(self._struct)
        self._compute = _library().multilora_run
        _FIXED.pack_into(
            self._struct,
            0,
            mode,
            slices,
            k,
            max_rank,
            DTYPE_CODES[weights[0].dtype],
            layout.tile_rows,
            ranks.data_ptr(),
            *ranks.stride(),
            overwrite,
            *_places_of(factors),
            scale,
        )
        offset = 0
        for i in range(slices):
            a, b = (lora_a[i] if lora_a else None), (lora_b[i] if lora_b else None)
            cols = 0 if b is None else b.size(-2)
            _SLICE.pack_into(
                self._struct,
                _SLICES_AT + i * _SLICE.size,
                *((0, 0, 0) if a is None else (a.data_ptr(), a.stride(0), a.stride(-2))),
                *((0, 0, 0, 0) if b is None else (b.data_ptr(), b.stride(0), *b.stride()[-2:])),
                cols,
                offset,
            )
            offset += cols
        self._plan_offsets = tuple(
            part.start * _INT_BYTES
            for part in (layout.order, layout.tile_slot, layout.tile_start, layout.tile_length)
        )
        # The last batch's, whose description the struct has.
        self._caller = self._threads = 0
        self._scratch: torch.Tensor | None = None
        self._plan: torch.Tensor | None = None

    def __call__(
        self,
        plan: torch.Tensor,
        *,
        x: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        h: torch.Tensor | None = None,
        offset: int = 0,
    ) -> None:
        """Computes a batch; the tensors are valid and those that the mode needs.

        Args:
            plan: A plan's buffer.
            x: [tokens, K], for `LINEAR` and `SHRINK`.
            y: [tokens, width], for `LINEAR` and `EXPAND`.
            h: [slices, tokens, R], for `SHRINK` and `EXPAND`.
            offset: First column of y.
        """
        self._plan = None
        caller, threads = threading.get_ident(), torch.get_num_threads()
        if self._scratch is None or caller != self._caller or threads != self._threads:
            floats = _library().multilora_scratch_floats(self._address, threads)
            self._scratch = _scratch.memory(floats)  # kept: the thread may need a longer one later
            self._caller, self._threads = caller, threads
        base = plan.data_ptr()
        order, slot, start, rows = self._plan_offsets
        _BATCH.pack_into(
            self._struct,
            _BATCH_AT,
            self._threads,
            self._scratch.data_ptr(),
            x.size(0) if x is not None else h.size(1) if h is not None else 0,
            *((0, 0) if x is None else (x.stride(0), DTYPE_CODES[x.dtype])),
            *((0, 0) if y is None else (y.stride(0), DTYPE_CODES[y.dtype])),
            offset,
            *((0, 0, 0) if h is None else (h.stride(0), h.stride(1), DTYPE_CODES[h.dtype])),
            base,
            base + order,
            base + slot,
            base + start,
            base + rows,
        )
        if x is not None and y is not None and x.is_contiguous() and y.is_contiguous():
            self._plan, self._x_shape, self._y_shape = plan, x.shape, y.shape
            self._x_dtype, self._y_dtype = x.dtype, y.dtype
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in (x, y, h))
        _ADDRESSES.pack_into(self._struct, _FIXED.size, *addresses)
        self._compute(self._address)

    def run_again(self, y: torch.Tensor, x: torch.Tensor, plan: torch.Tensor) -> bool:
        """Computes a batch if only values and addresses differ from the last one's.

        Where the caches are cold, as between a model's products, describing a batch takes Python
        about as long as reading a small adapter's weights.

        Returns:
            Whether it did; what is not like the last batch has to be checked.
        """
        if (
            plan is not self._plan
            or x.shape != self._x_shape
            or y.shape != self._y_shape
            or x.dtype is not self._x_dtype
            or y.dtype is not self._y_dtype
            or not (x.is_contiguous() and y.is_contiguous())
            or torch.get_num_threads() != self._threads
            or threading.get_ident() != self._caller
        ):
            return False
        _ADDRESSES.pack_into(self._struct, _FIXED.size, x.data_ptr(), y.data_ptr(), 0)
        self._compute(self._address)
        return True


def _places_of(factors: OutputFactors | None) -> tuple[int, int, int, int, int]:
    """Addresses and strides of factors, as struct lora_call has them."""
    if factors is None:
        return 0, 0, 0, 0, 0
    values, marks, bias = factors.values, factors.marks, factors.bias
    return (
        values.data_ptr(),
        values.stride(0),
        marks.data_ptr(),
        marks.stride(0),
        0 if bias is None else bias.data_ptr(),
    )


def prepare_linear(
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    scale: float,
    add_inputs: bool,
    factors: OutputFactors | None = None,
) -> Call:
    """What runs a batch of `multilora_kernels.PreparedLinear`; arguments are valid."""
    return Call(
        LINEAR,
        lora_a,
        lora_b,
        ranks,
        layout,
        scale=scale,
        overwrite=not add_inputs,
        factors=factors,
    )


def prepare_shrink(
    lora_a: Sequence[torch.Tensor], ranks: torch.Tensor, layout: PlanLayout, scale: float
) -> Callable[..., None]:
    """The same of `multilora_kernels.PreparedShrink`."""
    return Call(SHRINK, lora_a, (), ranks, layout, scale=scale)


def prepare_expand(
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    offset: int,
    add_inputs: bool,
) -> Callable[..., None]:
    """The same of `multilora_kernels.PreparedExpand`."""
    call = Call(EXPAND, (), lora_b, ranks, layout, overwrite=not add_inputs)
    return partial(call, offset=offset)


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
    factors: OutputFactors | None = None,
) -> None:
    """See `multilora_kernels.lora_linear`; arguments are valid, tensors are on the CPU."""
    run = prepare_linear(lora_a, lora_b, ranks, layout, scale, add_inputs, factors)
    run(plan, x=x, y=y, offset=offset)


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
    prepare_shrink(lora_a, ranks, layout, scale)(plan, x=x, h=h)


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
    prepare_expand(lora_b, ranks, layout, offset, add_inputs)(plan, y=y, h=h)
