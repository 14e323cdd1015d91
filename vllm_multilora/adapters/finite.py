"""Whether weights are numbers that the slots can hold: no NaN, no infinity, no overflow.

A float's magnitude, read as an integer without its sign bit, grows with the number, and infinity
and NaN are the largest of all. So one maximum over integers answers both questions, whatever the
type, as fast as memory is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.blocks import read_span
from vllm_multilora.adapters.errors import AdapterReadError
from vllm_multilora.adapters.folder import unreadable
from vllm_multilora.adapters.header import TensorInfo
from vllm_multilora.adapters.problem_list import ProblemList
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.tensor_file import TensorFile

_CHUNK_BYTES = 1 << 18  # stays in the second-level cache between reading and looking
_WORDS: Mapping[torch.dtype, tuple[type[np.unsignedinteger], int, int]] = {
    # The type as unsigned integers, without sign bit, and from which magnitude on: not finite.
    torch.float32: (np.uint32, 0x7FFFFFFF, 0x7F800000),
    torch.bfloat16: (np.uint16, 0x7FFF, 0x7F80),
    torch.float16: (np.uint16, 0x7FFF, 0x7C00),
}


def check_values(
    file: TensorFile,
    tensors: Iterable[tuple[str, float]],
    dtype: torch.dtype,
    problems: ProblemList,
) -> None:
    """Reads weights once and notes those that are not finite or become so in the slots.

    Args:
        file: An open file.
        tensors: Names in the file, each with the factor that its values get on the way into a
            slot; all of a type in `WEIGHT_DTYPES`.
        dtype: Of the slots.
        problems: Where problems are noted.

    Raises:
        AdapterReadError: The file was truncated after it was opened, or cannot be read.
    """
    reader = _Reader(file)
    most = torch.finfo(dtype).max
    ordered = sorted(tensors, key=lambda item: file.tensors[item[0]].begin)
    for name, factor in ordered:
        info = file.tensors[name]
        largest, first, count = reader.largest(name, info)
        if count:
            where = np.unravel_index(first, info.shape)
            problems.add(
                Code.NOT_FINITE,
                name,
                f"{count} of {math.prod(info.shape)} values NaN or infinite, the first at "
                f"{[int(i) for i in where]}",
                "finite numbers",
                verb="has",
                hint="the training run diverged, or the file is damaged",
                cause="not finite",
            )
        elif largest * abs(factor) > most:
            problems.add(
                Code.OVERFLOW,
                name,
                f"values up to {largest:g}, times the scaling {factor:g}",
                f"at most {most:g}, the largest {str(dtype).removeprefix('torch.')}",
                verb="has",
                hint="serve it with --lora-dtype bfloat16, which reaches further, or scale it down",
                cause="overflow",
            )


class _Reader:
    """Reads tensors chunk by chunk into the same memory."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._bytes = np.empty(_CHUNK_BYTES, dtype=np.uint8)
        self._magnitudes = np.empty(_CHUNK_BYTES, dtype=np.uint8)

    def largest(self, name: str, info: TensorInfo) -> tuple[float, int, int]:
        """The largest magnitude; the first value that is not finite, and how many there are."""
        words, mask, infinity = _WORDS[info.dtype]
        largest = count = first = 0
        for at in range(info.begin, info.end, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, info.end - at)
            self._read(name, at, size)
            magnitudes = self._magnitudes[:size].view(words)
            np.bitwise_and(self._bytes[:size].view(words), words(mask), out=magnitudes)
            here = int(magnitudes.max())
            if here >= infinity:
                bad: npt.NDArray[np.bool_] = magnitudes >= words(infinity)
                if not count:
                    first = (at - info.begin) // info.dtype.itemsize + int(bad.argmax())
                count += int(np.count_nonzero(bad))
            largest = max(largest, here)
        value = torch.from_numpy(np.array([largest], words).view(words)).view(info.dtype)
        return float(value), first, count

    def _read(self, name: str, at: int, size: int) -> None:
        try:
            complete = read_span(self._file.fileno(), at, torch.from_numpy(self._bytes[:size]))
        except OSError as error:
            raise AdapterReadError.of(unreadable(self._file.tensors_path, error)) from error
        if not complete:
            raise self._file.ends_early(name)
