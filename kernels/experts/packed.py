"""Products with experts' weights as vLLM's CPU build packs them; calls `experts.c`."""

from __future__ import annotations

import ctypes
import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.native.compiler import check_size, load_library, load_releasing_library
from multilora_kernels.native.segment_gemm import DTYPE_CODES

BLOCK = 16
"""Outputs of a block of packed weights."""

_RELEASING_BYTES = 8 << 20  # of weights: reading more takes long enough to let others run
_CALL = struct.Struct("=12q")  # struct experts_call
_SUM_CALL = struct.Struct("=12q")  # struct experts_sum_call
_PACKINGS = {(torch.float32, 1): 0, (torch.bfloat16, 1): 1, (torch.bfloat16, 2): 2}


class PackedExperts:
    """The weights of one projection of all experts of a layer.

    Args:
        weights: [experts, outputs, inputs], packed: in blocks of `BLOCK` outputs, in these words of
            inputs, and in these the block's outputs; kept, not copied.
        word: Inputs of a word: 1, or 2 for processors with AMX.
        bias: [experts, outputs], or None.

    Raises:
        ValueError: There is no product for weights of this type or shape.
    """

    def __init__(self, weights: torch.Tensor, word: int, bias: torch.Tensor | None = None) -> None:
        packing = _PACKINGS.get((weights.dtype, word))
        experts, outputs, inputs = weights.shape
        if packing is None or outputs % BLOCK or inputs % word or not weights.is_contiguous():
            raise ValueError(
                f"expected float32 or bfloat16 weights in blocks of {BLOCK} outputs and words of 1 "
                f"or 2 inputs, found {weights.dtype} of {list(weights.shape)} in words of {word}"
            )
        self._weights, self._packing = weights, packing
        self.outputs, self.inputs, self.experts = outputs, inputs, experts
        self._bias = None if bias is None else bias.float().contiguous()
        large = weights.nbytes > _RELEASING_BYTES
        self._run = (_releasing_library() if large else _library()).multilora_experts
        codes = {code: dtype for dtype, code in DTYPE_CODES.items()}
        self._x_dtype = codes[_library().multilora_experts_x(packing)]

    def multiply(self, y: torch.Tensor, x: torch.Tensor, segments: npt.NDArray[np.int32]) -> None:
        """`y[row] = x[row] @ W[expert].T + bias[expert]`, for the segments' rows.

        Args:
            y: float32 [rows, outputs], contiguous.
            x: [rows, inputs], rows contiguous.
            segments: int32 [segments, 3], contiguous: expert, first row and rows.
        """
        x = x.to(self._x_dtype)
        self._run(
            _CALL.pack(
                self._weights.data_ptr(),
                self._packing,
                0 if self._bias is None else self._bias.data_ptr(),
                self.outputs,
                self.inputs,
                x.data_ptr(),
                x.stride(0),
                y.data_ptr(),
                y.stride(0),
                segments.ctypes.data,
                len(segments),
                torch.get_num_threads(),
            )
        )


def sum_of_experts(
    out: torch.Tensor,
    y: torch.Tensor,
    places: npt.NDArray[np.int32],
    weights: torch.Tensor,
    rows: npt.NDArray[np.int32],
) -> None:
    """`out[rows[t]] = sum over j of weights[t, j] * y[places[t, j]]`.

    Args:
        out: [all rows, width], rows contiguous.
        y: float32 [pairs, width], contiguous.
        places: int32 [tokens, k], contiguous.
        weights: float32 [tokens, k], contiguous.
        rows: int32 [tokens], contiguous.
    """
    _library().multilora_experts_sum(
        _SUM_CALL.pack(
            y.data_ptr(),
            y.stride(0),
            places.ctypes.data,
            weights.data_ptr(),
            rows.ctypes.data,
            *places.shape,
            y.size(1),
            out.data_ptr(),
            out.stride(0),
            DTYPE_CODES[out.dtype],
            torch.get_num_threads(),
        )
    )


@lru_cache(maxsize=1)
def _library() -> Any:
    library = load_library()
    check_size(library, "multilora_experts_call_bytes", _CALL.size)
    check_size(library, "multilora_experts_sum_call_bytes", _SUM_CALL.size)
    return _with_types(library)


@lru_cache(maxsize=1)
def _releasing_library() -> Any:
    _library()  # checks it
    return _with_types(load_releasing_library())


def _with_types(library: Any) -> Any:
    library.multilora_experts_x.argtypes = [ctypes.c_int64]
    library.multilora_experts_x.restype = ctypes.c_int64
    for function in (library.multilora_experts, library.multilora_experts_sum):
        function.argtypes, function.restype = [ctypes.c_char_p], None
    return library
