"""The public functions: argument checks, choice of backend, and the custom operators.

Semantics, for tokens t with slot s(t) (-1: no adapter), slices i and r = ranks[i, s(t)]::

    y[t, off_i : off_i + N_i] += scale * (x[t] @ A_i[s(t), :r].T) @ B_i[s(t), :, :r].T

`OutputFactors` says what adapters with factors do to y then, and `reference.py` is the same in
loops. Under `torch.compile` every call is one opaque operator of the library `multilora`; outside
it the backend is called directly, which saves the dispatcher's time on every layer of every step.
A `PreparedLinear` is named by a number there, which comes in a tensor: compiled code that is kept
from process to process, or shared by several engines of one, then holds no other engine's layers.

A batch in which nobody has an adapter launches no kernel. That is decided on the host as a call
runs. While a CUDA graph is being captured a call launches its kernels all the same, for the graph
may be replayed with any batch; the plan knows better only if it was told that batches without
adapters have graphs of their own (`BatchPlan.update`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import count
from types import ModuleType
from weakref import WeakValueDictionary

import torch

from multilora_kernels import native, torch_backend, triton_availability
from multilora_kernels.factors import OutputFactors
from multilora_kernels.native import segment_gemm
from multilora_kernels.plan import (
    PLAN_OWN_GRAPHS,
    PLAN_ROWS,
    PLAN_TOKENS,
    BatchPlan,
    PlanLayout,
)

BACKENDS = ("auto", "native", "torch", "triton", "triton-invariant")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_layout = lru_cache(PlanLayout)


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """The backend that `backend` means on a device.

    `auto` is `native` (the C kernels) on CPUs that can build it, `triton` on CUDA and ROCm
    devices where Triton is installed, else `torch`. `triton-invariant` is `triton` with blocks
    that do not depend on the batch, so that a row's bits do not either.

    Raises:
        ValueError: The backend is unknown, or does not run on this device.
        NativeUnavailableError: `native` was asked for by name and cannot be had.
        TritonUnavailableError: Triton cannot be had, or runs as an interpreter where it must not
            or does not where it must.
    """
    resolved: str = _resolve(backend, torch.device(device).type)
    return resolved


@torch.compiler.assume_constant_result
def _resolve(backend: str, device_type: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if device_type == "cuda" and triton_availability.is_installed():
            backend = "triton"
        elif device_type == "cpu" and native.is_available():
            backend = "native"
        else:
            backend = "torch"
    if backend == "native":
        if device_type != "cpu":
            raise ValueError(f"the native backend runs on CPU tensors only, not on {device_type}")
        native.load_library()
    if backend in ("triton", "triton-invariant"):
        triton_availability.require(device_type)
    return backend


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
    backend, layout = _resolve(backend, x.device.type), plan.layout
    _check_linear_weights(lora_a, lora_b, ranks, layout)
    _check_activations(y=y, x=x)
    columns = lora_a[0].size(-1)
    _check(x.size(1) == columns, f"x must have {columns} columns, as lora_a has", x.shape)
    width = offset + sum(b.size(-2) for b in lora_b)
    _check(y.size(1) >= width, f"y must have at least {width} columns", y.shape)
    _check_factors(factors, lora_b, layout, add_inputs)
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
    backend, layout = _resolve(backend, x.device.type), plan.layout
    _check_weights("lora_a", lora_a, ranks, layout, columns=x.size(-1))
    _check_activations(h=h[0], x=x)
    expected = (len(lora_a), x.size(0), lora_a[0].size(-2))
    _check(h.shape == expected, f"h must have shape {list(expected)}", h.shape)
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
    backend, layout = _resolve(backend, y.device.type), plan.layout
    _check_weights("lora_b", lora_b, ranks, layout, columns=h.size(-1), by_column=True)
    _check_activations(y=y, h=h[0])
    _check(h.size(0) == len(lora_b), f"h must have {len(lora_b)} slices", h.shape)
    width = offset + sum(b.size(-2) for b in lora_b)
    _check(y.size(1) >= width, f"y must have at least {width} columns", y.shape)
    shared = plan.buffer, plan.host, *_fields(layout)
    _expand(y, h, lora_b, ranks, *shared, offset, add_inputs, backend)


class PreparedLinear:
    """`lora_linear` for one layer: weights are checked and described once, then run per batch.

    What a serving engine calls in every layer of every step, under `torch.compile` too; make it
    before, outside the compiled code, and keep it as long as that code may run. An instance must
    not be run by two threads at the same time. On GPUs what a launch needs, beside a batch's own
    tensors, is worked out once for each power of two of tokens and kept.

    Args:
        lora_a, lora_b, ranks, scale, add_inputs, factors, backend: as for `lora_linear`. The
            tensors are kept, not copied: their contents may change between runs.
        layout: the layout of the plans to come.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument.
    """

    def __init__(
        self,
        lora_a: Sequence[torch.Tensor],
        lora_b: Sequence[torch.Tensor],
        ranks: torch.Tensor,
        layout: PlanLayout,
        *,
        scale: float = 1.0,
        add_inputs: bool = True,
        factors: OutputFactors | None = None,
        backend: str = "auto",
    ) -> None:
        backend = _resolve(backend, ranks.device.type)
        _check_linear_weights(lora_a, lora_b, ranks, layout)
        _check_factors(factors, lora_b, layout, add_inputs)
        self._columns = lora_a[0].size(-1)
        self._width = sum(b.size(-2) for b in lora_b)
        self._layout = layout
        self._add_inputs = add_inputs
        number = next(_numbers)
        self._number = torch.tensor([number])
        _prepared[number] = self
        if backend == "native":
            call = segment_gemm.Call(
                segment_gemm.LINEAR,
                lora_a,
                lora_b,
                ranks,
                layout,
                scale=scale,
                overwrite=not add_inputs,
                factors=factors,
            )
            self._run: Callable[..., None] = call.run
        elif backend.startswith("triton"):
            self._run = (
                _module(backend)
                .prepare_linear(lora_a, lora_b, ranks, layout, scale, add_inputs, factors)
                .run
            )
        else:
            module, kept = _module(backend), (tuple(lora_a), tuple(lora_b), ranks)

            def run(plan: torch.Tensor, *, x: torch.Tensor, y: torch.Tensor) -> None:
                module.lora_linear(y, x, *kept, plan, layout, scale, 0, add_inputs, factors)

            self._run = run

    def __call__(self, y: torch.Tensor, x: torch.Tensor, plan: BatchPlan) -> None:
        """Computes a batch in place on y; shapes as for `lora_linear`.

        Raises:
            ValueError: A shape, dtype or stride does not fit, or the plan has another layout.
        """
        if torch.compiler.is_compiling():
            _prepared_operator(y, x, plan.buffer, plan.host, self._number)
            return
        if plan.layout is not self._layout and plan.layout != self._layout:
            raise ValueError(f"expected a plan of {self._layout}, found one of {plan.layout}")
        self.run(y, x, plan.buffer, plan.host)

    def run(
        self, y: torch.Tensor, x: torch.Tensor, plan: torch.Tensor, host_plan: torch.Tensor
    ) -> None:
        """As a call, by the plan's `buffer` and `host`.

        Raises:
            ValueError: A shape, dtype or stride does not fit.
        """
        (rows, columns), (y_rows, y_columns) = _checked_shape("x", x), _checked_shape("y", y)
        if (
            columns != self._columns
            or y_columns < self._width
            or rows != y_rows
            or plan.size(0) != self._layout.size
        ):
            raise ValueError(
                f"expected x of shape [tokens, {self._columns}], y of shape [tokens, >= "
                f"{self._width}] and a plan of {self._layout.size} numbers; found {list(x.shape)}, "
                f"{list(y.shape)} and {plan.size(0)}"
            )
        if not (tokens := _tokens_to_skip(host_plan, y.device)):
            self._run(plan, x=x, y=y)
        elif not self._add_inputs:
            y[:tokens, : self._width].zero_()


_numbers = count(1)  # none is used again
_prepared: WeakValueDictionary[int, PreparedLinear] = WeakValueDictionary()


def column_major(lora_b: torch.Tensor) -> torch.Tensor:
    """A zeroed tensor of lora_b's shape and dtype, stored so that its columns are contiguous.

    Kernels read the first r columns of B: stored this way these are exactly r contiguous pieces.
    The native kernels transpose nothing on the way, and GPUs read whole sectors at any rank.
    """
    return torch.zeros_like(lora_b.transpose(-1, -2).contiguous()).transpose(-1, -2)


def _check_linear_weights(
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
) -> None:
    _check(len(lora_a) == len(lora_b) > 0, "lora_a and lora_b must have the same slices", lora_a)
    _check_weights("lora_a", lora_a, ranks, layout, columns=lora_a[0].size(-1))
    _check_weights("lora_b", lora_b, ranks, layout, columns=lora_a[0].size(-2), by_column=True)


def _check_factors(
    factors: OutputFactors | None,
    lora_b: Sequence[torch.Tensor],
    layout: PlanLayout,
    add_inputs: bool,
) -> None:
    if factors is None:
        return
    _check(add_inputs, "factors need add_inputs=True: they are of what y holds", add_inputs)
    factors.check(len(lora_b), layout.max_loras, sum(b.size(-2) for b in lora_b))


def _tensors_of(
    factors: OutputFactors | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    return (None, None, None) if factors is None else (factors.values, factors.marks, factors.bias)


def _check(condition: bool, message: str, found: object) -> None:
    if not condition:
        shape = list(found) if isinstance(found, torch.Size) else found
        raise ValueError(f"{message}, found {shape}")


def _check_weights(
    name: str,
    weights: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    *,
    columns: int,
    by_column: bool = False,
) -> None:
    dtype = weights[0].dtype
    for i, w in enumerate(weights):
        shape = w.shape
        if (
            shape[-1] != columns
            or shape[0] != layout.max_loras
            or w.dtype != dtype
            or not (w.stride(-1) == 1 or (by_column and w.stride(-2) == 1))
            or not (len(shape) == 3 or (len(shape) == 4 and shape[1] == 1))
        ):
            raise ValueError(
                f"{name}[{i}] must have shape [{layout.max_loras}, rows, {columns}] (or with a 1 "
                f"after the slots), dtype {dtype} and contiguous rows"
                f"{' or columns' if by_column else ''}; found shape {list(shape)}, "
                f"dtype {w.dtype}, strides {list(w.stride())}"
            )
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, found {dtype}")
    if ranks.shape != (len(weights), layout.max_loras) or ranks.dtype != torch.int32:
        raise ValueError(
            f"ranks must be int32 of shape [{len(weights)}, {layout.max_loras}], found "
            f"{ranks.dtype} of shape {list(ranks.shape)}"
        )


def _check_activations(**tensors: torch.Tensor) -> None:
    rows = {_checked_shape(name, tensor)[0] for name, tensor in tensors.items()}
    if len(rows) > 1:
        raise ValueError(
            f"all activations must have the same tokens; found "
            f"{ {key: list(value.shape) for key, value in tensors.items()} }"
        )


def _checked_shape(name: str, tensor: torch.Tensor) -> torch.Size:
    shape = tensor.shape
    if len(shape) != 2 or tensor.stride(1) != 1 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be 2-D with contiguous rows in float32, bfloat16 or float16; found "
            f"shape {list(shape)}, strides {list(tensor.stride())}, {tensor.dtype}"
        )
    return shape


def _tokens_to_skip(plan: torch.Tensor, device: torch.device) -> int:
    """The batch's tokens if no kernel has to be launched for them, else 0; of a plan on the host.

    A plan that was never filled has no tokens. It counts as one with adapters: whoever captures
    a graph before the first batch does not know yet what will come.
    """
    header = plan.numpy()
    if header[PLAN_ROWS] or (not header[PLAN_OWN_GRAPHS] and _is_capturing(device)):
        return 0
    return int(header[PLAN_TOKENS])


def _is_capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes part of a CUDA graph; asks the driver on GPUs only."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _fields(layout: PlanLayout) -> tuple[int, int, int]:
    return layout.max_tokens, layout.max_loras, layout.tile_rows


def _module(backend: str) -> ModuleType:
    if backend == "native":
        return segment_gemm
    if backend == "triton":
        from multilora_kernels import triton  # only where it is used: it is not always installed

        return triton
    if backend == "triton-invariant":
        from multilora_kernels.triton import invariant

        return invariant
    return torch_backend


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
    if tokens := _tokens_to_skip(host_plan, y.device):
        if not add_inputs:
            _zero_span(y, tokens, offset, lora_b)
        return
    layout = _layout(max_tokens, max_loras, tile_rows)
    factors = None if values is None or marks is None else OutputFactors(values, marks, bias)
    _module(backend).lora_linear(
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
    if tokens := _tokens_to_skip(host_plan, h.device):
        h[:, :tokens].zero_()
        return
    layout = _layout(max_tokens, max_loras, tile_rows)
    _module(backend).lora_shrink(h, x, lora_a, ranks, plan, layout, scale)


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
    if tokens := _tokens_to_skip(host_plan, y.device):
        if not add_inputs:
            _zero_span(y, tokens, offset, lora_b)
        return
    layout = _layout(max_tokens, max_loras, tile_rows)
    _module(backend).lora_expand(y, h, lora_b, ranks, plan, layout, offset, add_inputs)


def _prepared_op(
    y: torch.Tensor,
    x: torch.Tensor,
    plan: torch.Tensor,
    host_plan: torch.Tensor,
    prepared: torch.Tensor,
) -> None:
    number = int(prepared.item())
    found = _prepared.get(number)
    if found is None:
        raise RuntimeError(
            f"compiled code asks for prepared layer {number}, which is gone: a PreparedLinear must "
            "be kept as long as the code that was compiled with it"
        )
    found.run(y, x, plan, host_plan)


def _zero_span(y: torch.Tensor, tokens: int, offset: int, lora_b: Sequence[torch.Tensor]) -> None:
    y[:tokens, offset : offset + sum(b.size(-2) for b in lora_b)].zero_()


_library = torch.library.Library("multilora", "DEF")


def _register(name: str, function, mutated: str):  # type: ignore[no-untyped-def]
    schema = torch.library.infer_schema(function, mutates_args=[mutated])
    _library.define(name + schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    _library._register_fake(name, lambda *args: None)
    operator = getattr(torch.ops.multilora, name)

    def call(*args):  # type: ignore[no-untyped-def]
        if torch.compiler.is_compiling():
            return operator(*args)
        return function(*args)

    return call


_linear = _register("lora_linear", _linear_op, "y")
_shrink = _register("lora_shrink", _shrink_op, "h")
_expand = _register("lora_expand", _expand_op, "y")

_register("prepared_linear", _prepared_op, "y")
_prepared_operator = torch.ops.multilora.prepared_linear.default
