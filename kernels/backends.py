"""Which kernels run: the backends' names, what `auto` means, and their modules."""

from __future__ import annotations

from types import ModuleType

import torch

from multilora_kernels import native, torch_backend, triton_availability
from multilora_kernels.native import segment_gemm

BACKENDS = ("auto", "native", "torch", "triton", "triton-invariant")


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
    resolved: str = resolve(backend, torch.device(device).type)
    return resolved


@torch.compiler.assume_constant_result
def resolve(backend: str, device_type: str) -> str:
    """As `resolve_backend`, by the kind of device; compiled code asks once."""
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


def module_of(backend: str) -> ModuleType:
    """The module of a resolved backend: its functions are those of `torch_backend`."""
    if backend == "native":
        return segment_gemm
    if backend == "triton":
        from multilora_kernels import triton  # only where it is used: it is not always installed

        return triton
    if backend == "triton-invariant":
        from multilora_kernels.triton import invariant

        return invariant
    return torch_backend
