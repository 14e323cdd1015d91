"""Checks of what callers pass; errors name the argument, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PlanLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_linear_weights(
    lora_a: Sequence[torch.Tensor],
    lora_b: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
) -> None:
    """Checks a layer's weights: A and B of every slice, and their true ranks."""
    check(len(lora_a) == len(lora_b) > 0, "lora_a and lora_b must have the same slices", lora_a)
    check_weights("lora_a", lora_a, ranks, layout, columns=lora_a[0].size(-1))
    check_weights("lora_b", lora_b, ranks, layout, columns=lora_a[0].size(-2), by_column=True)
    dtype = lora_a[0].dtype
    check(lora_b[0].dtype == dtype, f"lora_b must be {dtype}, as lora_a is", lora_b[0].dtype)


def check_factors(
    factors: OutputFactors | None,
    lora_b: Sequence[torch.Tensor],
    layout: PlanLayout,
    add_inputs: bool,
) -> None:
    """Checks the factors of a layer's outputs."""
    if factors is None:
        return
    check(add_inputs, "factors need add_inputs=True: they are of what y holds", add_inputs)
    factors.check(len(lora_b), layout.max_loras, sum(b.size(-2) for b in lora_b))


def check(condition: bool, message: str, found: object) -> None:
    """Raises ValueError with what was expected and found, unless the condition holds."""
    if not condition:
        shape = list(found) if isinstance(found, torch.Size) else found
        raise ValueError(f"{message}, found {shape}")


def check_weights(
    name: str,
    weights: Sequence[torch.Tensor],
    ranks: torch.Tensor,
    layout: PlanLayout,
    *,
    columns: int,
    by_column: bool = False,
) -> None:
    """Checks all A or all B: matrices of so many columns, with contiguous rows (or columns)."""
    dtype = weights[0].dtype
    for i, w in enumerate(weights):
        shape = w.shape
        if (
            shape[-1] != columns
            or shape[0] != layout.max_loras
            or w.dtype != dtype
            or w.device != ranks.device
            or not (w.stride(-1) == 1 or (by_column and w.stride(-2) == 1))
            or not (len(shape) == 3 or (len(shape) == 4 and shape[1] == 1))
        ):
            raise ValueError(
                f"{name}[{i}] must have shape [{layout.max_loras}, rows, {columns}] (or with a 1 "
                f"after the slots), dtype {dtype} and contiguous rows"
                f"{' or columns' if by_column else ''} on {ranks.device}, as ranks; found shape "
                f"{list(shape)}, dtype {w.dtype}, strides {list(w.stride())} on {w.device}"
            )
    if dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, found {dtype}")
    if ranks.shape != (len(weights), layout.max_loras) or ranks.dtype != torch.int32:
        raise ValueError(
            f"ranks must be int32 of shape [{len(weights)}, {layout.max_loras}], found "
            f"{ranks.dtype} of shape {list(ranks.shape)}"
        )


def check_activations(**tensors: torch.Tensor) -> None:
    """Checks that activations have contiguous rows, and all the same number of them."""
    rows = {checked_shape(name, tensor)[0] for name, tensor in tensors.items()}
    if len(rows) > 1:
        raise ValueError(
            f"all activations must have the same tokens; found "
            f"{ {key: list(value.shape) for key, value in tensors.items()} }"
        )


def check_devices(**tensors: torch.Tensor) -> None:
    """Checks that all tensors are on one device."""
    devices = {name: str(tensor.device) for name, tensor in tensors.items()}
    check(len(set(devices.values())) == 1, "all tensors must be on one device", devices)


def checked_shape(name: str, tensor: torch.Tensor) -> torch.Size:
    """The shape of activations with contiguous rows."""
    shape = tensor.shape
    if len(shape) != 2 or tensor.stride(1) != 1 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name} must be 2-D with contiguous rows in float32, bfloat16 or float16; found "
            f"shape {list(shape)}, strides {list(tensor.stride())}, {tensor.dtype}"
        )
    return shape
