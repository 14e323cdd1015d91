"""The public functions: argument checks, and the custom operators.

Semantics, for tokens t with slot s(t) (-1: no adapter), slices i and r = ranks[i, s(t)]::

    y[t, off_i : off_i + N_i] += scale * (x[t] @ A_i[s(t), :r].T) @ B_i[s(t), :, :r].T

`OutputFactors` says what adapters with factors do to y then, and `reference.py` is the same in
loops. Under `torch.compile` every call is one opaque operator of the library `multilora`; outside
it the backend is called directly, which saves the dispatcher's time on every layer of every step.

A batch in which nobody has an adapter launches no kernel. That is decided on the host as a call
runs. While a CUDA graph is being captured a call launches its kernels all the same, for the graph
may be replayed with any batch; the plan knows better only if it was told that batches without
adapters have graphs of their own (`BatchPlan.update`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from multilora_kernels.backends import module_of, resolve
from multilora_kernels.checks import (
    check,
    check_activations,
    check_devices,
    check_factors,
    check_linear_weights,
    check_weights,
)
from multilora_kernels.factors import OutputFactors
from multilora_kernels.operators import register
from multilora_kernels.plan import BatchPlan, PlanLayout
from multilora_kernels.skipping import tokens_to_skip

_layout = lru_cache(PlanLayout)


def lora_linear(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: BatchPlan,
    *,
    scale: float = 1.0,
    offset: int = 0,
    add_inputs: bool = True,
    factors: OutputFactors | None = None,
    backend: str = "auto",
) -> None:
    """Adds each token's own adapter to a linear layer's output, in place on y.

    Shapes: T tokens, K input width, N_i output width of slice i, S slots, R maximum rank.

    Args:
        y: of shape [T, W] with W >= offset + sum(N_i); float32, bfloat16 or float16.
        x: of shape [T, K]; any of the three dtypes.
        lora_a: per slice, of shape [S, R, K] or [S, 1, R, K].
        lora_b: per slice, of shape [S, N_i, R] or [S, 1, N_i, R]; same dtype as lora_a. Rows
            or columns are contiguous; columns are faster (`column_major`).
        ranks: int32 of shape [slices, S]; only that many ranks are read and computed, and the
            weights past them may hold anything. 0: the slice is not adapted.
        plan: the batch; its tokens past T are skipped, rows of x past its tokens left alone.
        scale: factor of every product.
        offset: first column of y.
        add_inputs: if False, y's span is overwritten instead of added to, for every token of
            the plan: by zeros where a token has no adapter or its rank is 0.
        factors: what adapters multiply y by when their product has been added; None: nothing.
        backend: one of `BACKENDS`; see `resolve_backend`.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    backend, layout = resolve(backend, x.device.type), plan.layout
    check_linear_weights(lora_a, lora_b, ranks, layout)
    check_activations(y=y, x=x)
    check_devices(y=y, x=x, ranks=ranks, plan=plan.buffer)
    columns = lora_a[0].size(-1)
    check(x.size(1) == columns, f"x must have {columns} columns, as lora_a has", x.shape)
    check(offset >= 0, "offset must not be negative", offset)
    width = offset + sum(b.size(-2) for b in lora_b)
    check(y.size(1) >= width, f"y must have at least {width} columns", y.shape)
    check_factors(factors, lora_b, layout, add_inputs)
    _linear(
        y,
        x,
        lora_a,
        lora_b,
        ranks,
        plan.buffer,
        plan.host,
        *_fields(layout),
        scale,
        offset,
        add_inputs,
        backend,
        *_tensors_of(factors),
    )


def lora_shrink(
    h: torch.Tensor,
    x: torch.Tensor,
    lora_a: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: BatchPlan,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> None:
    """The first half of `lora_linear`: `h[i, t, :r] = scale * x[t] @ A_i[s(t), :r].T`.

    Args:
        h: of shape [slices, T, R]; overwritten for every token of the plan, by zeros past a
            token's rank.
        x: as for `lora_linear`, like all that follow.
        lora_a: per slice.
        ranks: true ranks.
        plan: the batch.
        scale: factor of every product.
        backend: which kernels.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    backend, layout = resolve(backend, x.device.type), plan.layout
    check_weights("lora_a", lora_a, ranks, layout, columns=x.size(-1))
    check_activations(h=h[0], x=x)
    check_devices(h=h, x=x, ranks=ranks, plan=plan.buffer)
    expected = (len(lora_a), x.size(0), lora_a[0].size(-2))
    check(h.shape == expected, f"h must have shape {list(expected)}", h.shape)
    _shrink(h, x, lora_a, ranks, plan.buffer, plan.host, *_fields(layout), scale, backend)


def lora_expand(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    plan: BatchPlan,
    *,
    offset: int = 0,
    add_inputs: bool = True,
    backend: str = "auto",
) -> None:
    """The second half: `y[t, off_i : off_i + N_i] += h[i, t, :r] @ B_i[s(t), :, :r].T`.

    Args:
        y: as for `lora_linear`, like all but h.
        h: of shape [slices, T, R].
        lora_b: per slice.
        ranks: true ranks.
        plan: the batch.
        offset: first column of y.
        add_inputs: add to y, or overwrite.
        backend: which kernels.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """
    backend, layout = resolve(backend, y.device.type), plan.layout
    check_weights("lora_b", lora_b, ranks, layout, columns=h.size(-1), by_column=True)
    check_activations(y=y, h=h[0])
    check_devices(y=y, h=h, ranks=ranks, plan=plan.buffer)
    check(h.size(0) == len(lora_b), f"h must have {len(lora_b)} slices", h.shape)
    check(offset >= 0, "offset must not be negative", offset)
    width = offset + sum(b.size(-2) for b in lora_b)
    check(y.size(1) >= width, f"y must have at least {width} columns", y.shape)
    shared = plan.buffer, plan.host, *_fields(layout)
    _expand(y, h, lora_b, ranks, *shared, offset, add_inputs, backend)


def column_major(lora_b: torch.Tensor) -> torch.Tensor:
    """A zeroed tensor of lora_b's shape and dtype, stored so that its columns are contiguous.

    Kernels read the first r columns of B: stored this way these are exactly r contiguous pieces.
    The native kernels transpose nothing on the way, and GPUs read whole sectors at any rank.
    """
    return torch.zeros_like(lora_b.transpose(-1, -2).contiguous()).transpose(-1, -2)


def _tensors_of(
    factors: OutputFactors | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return (None, None, None) if factors is None else (factors.values, factors.marks, factors.bias)


def _fields(layout: PlanLayout) -> tuple[int, int, int]:
    return layout.max_tokens, layout.max_loras, layout.tile_rows


# The operators. Tensor arguments, then the plan's layout as integers: schemas know no classes. The
# plan comes twice, on the device and on the host: compiled code must not look into it.


def _linear_op(
    y: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    host_plan: torch.Tensor,
    max_tokens: int,
    max_loras: int,
    tile_rows: int,
    scale: float,
    offset: int,
    add_inputs: bool,
    backend: str,
    values: torch.Tensor | None = None,
    marks: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> None:
    if tokens := tokens_to_skip(host_plan.numpy(), y):
        if not add_inputs:
            _zero_span(y, tokens, offset, lora_b)
        return
    layout = _layout(max_tokens, max_loras, tile_rows)
    factors = None if values is None or marks is None else OutputFactors(values, marks, bias)
    module_of(backend).lora_linear(
        y, x, lora_a, lora_b, ranks, plan, layout, scale, offset, add_inputs, factors
    )


def _shrink_op(
    h: torch.Tensor,
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    host_plan: torch.Tensor,
    max_tokens: int,
    max_loras: int,
    tile_rows: int,
    scale: float,
    backend: str,
) -> None:
    if tokens := tokens_to_skip(host_plan.numpy(), h):
        h[:, :tokens].zero_()
        return
    layout = _layout(max_tokens, max_loras, tile_rows)
    module_of(backend).lora_shrink(h, x, lora_a, ranks, plan, layout, scale)


def _expand_op(
    y: torch.Tensor,
    h: torch.Tensor,
    lora_b: list[torch.Tensor],
    ranks: torch.Tensor,
    plan: torch.Tensor,
    host_plan: torch.Tensor,
    max_tokens: int,
    max_loras: int,
    tile_rows: int,
    offset: int,
    add_inputs: bool,
    backend: str,
) -> None:
    if tokens := tokens_to_skip(host_plan.numpy(), y):
        if not add_inputs:
            _zero_span(y, tokens, offset, lora_b)
        return
    layout = _layout(max_tokens, max_loras, tile_rows)
    module_of(backend).lora_expand(y, h, lora_b, ranks, plan, layout, offset, add_inputs)


def _zero_span(y: torch.Tensor, tokens: int, offset: int, lora_b: Sequence[torch.Tensor]) -> None:
    y[:tokens, offset : offset + sum(b.size(-2) for b in lora_b)].zero_()


def _called(name: str, function: Callable[..., None], mutated: str) -> Callable[..., None]:
    """The function, or in compiled code the operator made of it."""
    operator = register(name, function, mutated)

    def call(*args: Any) -> None:
        if torch.compiler.is_compiling():
            operator(*args)
        else:
            function(*args)

    return call


_linear = _called("lora_linear", _linear_op, "y")
_shrink = _called("lora_shrink", _shrink_op, "h")
_expand = _called("lora_expand", _expand_op, "y")
