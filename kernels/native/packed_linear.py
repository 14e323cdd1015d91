"""A base layer's products on CPUs: those of a few rows by `packed_linear.c`, the others by oneDNN.

Of a few rows, as in decoding, oneDNN reads weights and multiplies in turn, so that a batch of 16
takes about twice as long as its weights take to be read. `packed_linear.c` does both at once. The
weights are there once: oneDNN packs them, and C reads them where they lie.
"""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from typing import Any

import torch

from multilora_kernels.native.builds import NativeUnavailableError
from multilora_kernels.native.compiler import check_size, load_library, load_releasing_library
from multilora_kernels.native.segment_gemm import DTYPE_CODES
from multilora_kernels.operators import Numbered, register_pure

MAX_ROWS = 64
"""Rows of a batch that C multiplies, `MAX_PACKED_ROWS` there. With more, oneDNN is as fast."""

_WORD_BYTES = 4
_CALL = struct.Struct("=11q")  # struct packed_call
_RELEASING_BYTES = 8 << 20  # of weights: reading more takes long enough to let others run
_ROWS_HINT = 16  # for oneDNN, which packs alike for all

_FINITE_BITS = 0x80, 0x7F80  # of positive bfloat16 numbers that are neither subnormal nor infinite

_expected: dict[tuple[torch.Size, torch.dtype], bool] = {}  # whether oneDNN packs them so
_numbered: Numbered[PackedLinear] = Numbered()


class PackedLinear:
    """`y = x @ weight.T + bias` with weights that do not change; `pack` makes one.

    Args:
        packed: Weights as oneDNN packs them, an opaque tensor, in the order that C expects.
        dtype: Of the weights.
        columns: Their outputs, whole blocks of them.
        k: Their inputs, whole words.
    """

    def __init__(self, packed: torch.Tensor, dtype: torch.dtype, columns: int, k: int) -> None:
        self._packed, self._dtype, self._columns, self._k = packed, dtype, columns, k
        self._blocks = columns // _block_columns(dtype)
        large = columns * k * dtype.itemsize > _RELEASING_BYTES
        self._multiply = _releasing_function() if large else _function()
        self._address: int = torch.ops.mkldnn.data_ptr(packed)
        self._number = _numbered.number(self)

    def __call__(
        self, x: torch.Tensor, weight: object = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiplies.

        Args:
            x: [..., K], of the weights' type.
            weight: Nothing; vLLM passes its layer's.
            bias: [columns], of the same type, or None.

        Returns:
            [..., columns].

        Raises:
            ValueError: A shape or dtype does not fit.
        """
        if torch.compiler.is_compiling():
            y: torch.Tensor = _operator(x, bias, self._number, self._columns)
            return y
        return self.run(x, bias)

    def run(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As a call, but not in code that is being compiled."""
        if x.dim() != 2:
            return self.run(x.reshape(-1, x.size(-1)), bias).view(*x.shape[:-1], self._columns)
        rows = x.size(0)
        if (
            x.size(1) != self._k
            or x.dtype is not self._dtype
            or (bias is not None and (bias.dtype is not x.dtype or bias.numel() != self._columns))
        ):
            raise ValueError(
                f"expected x of shape [..., {self._k}] and a bias of {self._columns} numbers or "
                f"none, of {self._dtype}; found {list(x.shape)} of {x.dtype} and "
                f"{None if bias is None else (list(bias.shape), bias.dtype)}"
            )
        threads = torch.get_num_threads()
        if (
            rows > MAX_ROWS
            or x.stride(1) != 1
            or (bias is not None and bias.stride(0) != 1)
            or not self._is_shared_well(threads)
        ):
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x, self._packed, bias, "none", [], ""
            )
            return y
        y = torch.empty((rows, self._columns), dtype=self._dtype, device="cpu")
        self._multiply(
            _CALL.pack(
                self._address,
                0 if bias is None else bias.data_ptr(),
                self._columns,
                self._k,
                DTYPE_CODES[self._dtype],
                x.data_ptr(),
                y.data_ptr(),
                rows,
                x.stride(0),
                self._columns,
                threads,
            )
        )
        return y

    def _is_shared_well(self, threads: int) -> bool:
        """Whether whole blocks keep so many threads busy for three quarters of the time."""
        longest = -(-self._blocks // threads)
        return 4 * self._blocks >= 3 * longest * threads


def pack(weight: torch.Tensor) -> PackedLinear | None:
    """Packs a layer's weights.

    Args:
        weight: [columns, K], on the CPU; copied.

    Returns:
        None if C cannot multiply by them on this processor: they are neither float32 nor bfloat16,
        or no whole blocks, or oneDNN is missing or packs them otherwise.
    """
    if not _is_in_blocks(weight) or not hasattr(torch.ops.mkldnn, "data_ptr"):
        return None
    weight = weight.detach().contiguous()
    # Their order is oneDNN's own affair, and may be another one in another release.
    key = weight.shape, weight.dtype
    if key not in _expected:
        # Zeros, as a model's own weights may be, look alike in any order.
        marked = _distinct_numbers(weight.shape, weight.dtype)
        _expected[key] = _is_packed_as_expected(_packed(marked), marked)
    return PackedLinear(_packed(weight), weight.dtype, *weight.shape) if _expected[key] else None


def _packed(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
    return packed


def _distinct_numbers(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that differ from those near them, so that a wrong order shows."""
    bits = torch.arange(*_FINITE_BITS, dtype=torch.int16)
    bits = bits.repeat(-(-shape.numel() // bits.numel()))[: shape.numel()]
    return bits.view(torch.bfloat16).to(dtype).view(shape)


def _is_in_blocks(weight: torch.Tensor) -> bool:
    if weight.dim() != 2 or weight.device.type != "cpu" or not weight.numel():
        return False
    block = _block_columns(weight.dtype)
    columns, k = weight.shape
    return bool(block) and columns % block == 0 and k * weight.itemsize % _WORD_BYTES == 0


def _block_columns(dtype: torch.dtype) -> int:
    """Outputs of a block of weights of a type; 0 if C cannot multiply them on this processor."""
    if dtype not in DTYPE_CODES:
        return 0
    try:
        columns: int = _library().multilora_packed_columns(DTYPE_CODES[dtype])
    except NativeUnavailableError:
        return 0
    return columns


def _is_packed_as_expected(packed: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether weights lie in memory as `packed_linear.c` says."""
    if torch.ops.mkldnn._nbytes(packed) != weight.nbytes:
        return False
    block, of_word = _block_columns(weight.dtype), _WORD_BYTES // weight.itemsize
    bits = torch.int32 if of_word == 1 else torch.int16  # NaN is not equal to itself
    memory = (ctypes.c_char * weight.nbytes).from_address(torch.ops.mkldnn.data_ptr(packed))
    expected = weight.view(bits).view(-1, block, weight.size(1) // of_word, of_word)
    expected = expected.transpose(1, 2)
    return torch.equal(torch.frombuffer(memory, dtype=bits).view(expected.shape), expected)


@lru_cache(maxsize=1)
def _library() -> ctypes.PyDLL:
    library = load_library()
    check_size(library, "multilora_packed_call_bytes", _CALL.size)
    library.multilora_packed_columns.argtypes = [ctypes.c_int64]
    library.multilora_packed_columns.restype = ctypes.c_int64
    return library


def _function() -> Any:
    return _with_types(_library().multilora_packed_linear)


def _releasing_function() -> Any:
    return _with_types(load_releasing_library().multilora_packed_linear)


def _with_types(function: Any) -> Any:
    function.argtypes, function.restype = [ctypes.c_char_p], None
    return function


def _run_numbered(
    x: torch.Tensor, bias: torch.Tensor | None, layer: torch.Tensor, columns: int
) -> torch.Tensor:
    return _numbered.layer(layer).run(x, bias)


def _shaped(
    x: torch.Tensor, bias: torch.Tensor | None, layer: torch.Tensor, columns: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], columns)


_operator = register_pure("packed_linear", _run_numbered, _shaped)
