"""Element types of weights, without PyTorch: for processes that only read and pack adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class DType(NamedTuple):
    """An element type.

    Attributes:
        name: As PyTorch calls it, such as `bfloat16`.
        itemsize: Bytes of an element.
    """

    name: str
    itemsize: int

    def __str__(self) -> str:
        return self.name

    @property
    def torch(self) -> torch.dtype:
        """PyTorch's type of this name; the first use in a process imports PyTorch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


def of_torch(dtype: torch.dtype) -> DType:
    """The element type that PyTorch calls so."""
    return DType(str(dtype).removeprefix("torch."), dtype.itemsize)


FLOAT32 = DType("float32", 4)
BFLOAT16 = DType("bfloat16", 2)
FLOAT16 = DType("float16", 2)

KERNEL_DTYPES = (FLOAT32, BFLOAT16, FLOAT16)
"""Types that the C code reads and writes, in the order of its codes."""

SAFETENSORS_DTYPES = {
    "BOOL": DType("bool", 1),
    "U8": DType("uint8", 1),
    "I8": DType("int8", 1),
    "F8_E4M3": DType("float8_e4m3fn", 1),
    "F8_E5M2": DType("float8_e5m2", 1),
    "U16": DType("uint16", 2),
    "I16": DType("int16", 2),
    "F16": FLOAT16,
    "BF16": BFLOAT16,
    "U32": DType("uint32", 4),
    "I32": DType("int32", 4),
    "F32": FLOAT32,
    "U64": DType("uint64", 8),
    "I64": DType("int64", 8),
    "F64": DType("float64", 8),
}
"""The element types of safetensors files, by their names there."""
