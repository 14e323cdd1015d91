"""Weights that slots cannot hold: NaN, infinity, and values that overflow when scaled."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from multilora_kernels.dtypes import FLOAT32
from multilora_kernels.packs.packing import largest_number, to_float32
from vllm_multilora.adapters.files.header import TensorInfo
from vllm_multilora.adapters.files.one_pass import SPAN_BYTES, TensorPart
from vllm_multilora.adapters.files.tensor_file import TensorFile
from vllm_multilora.adapters.problems import Code, Problem, ProblemList


def explain(file: TensorFile, parts: Iterable[TensorPart]) -> list[Problem]:
    """Reads tensors with parts that `read_once` found bad; says why; raises `AdapterReadError`."""
    problems = ProblemList(str(file.file.path))
    causes = {(part.tensor, part.scale, part.dtype): None for part in parts}
    for name, factor, dtype in sorted(causes, key=lambda cause: file.tensors[cause[0]].begin):
        info = file.tensors[name]
        largest, first, count = _look(file, info)
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
        elif abs(factor) > largest_number(FLOAT32):
            problems.add(
                Code.OVERFLOW,
                name,
                f"the scaling {factor:g}",
                f"at most {largest_number(FLOAT32):g}, the largest float32: scaling is done in it",
                verb="has",
                hint="'lora_alpha' and 'r' must be those that the adapter was trained with",
                cause="scaling",
            )
        else:
            problems.add(
                Code.OVERFLOW,
                name,
                f"values up to {largest:g}, times the scaling {factor:g}",
                f"at most {largest_number(dtype):g}, the largest {dtype}",
                verb="has",
                hint="serve it with --lora-dtype bfloat16, which reaches further, or scale it down",
                cause="overflow",
            )
    return problems.grouped()


def _look(file: TensorFile, info: TensorInfo) -> tuple[float, int, int]:
    """The largest magnitude; the first value that is not finite, and how many there are."""
    largest, first, count = 0.0, 0, 0
    buffer = np.empty(min(SPAN_BYTES, info.end - info.begin), np.uint8)
    for at in range(info.begin, info.end, SPAN_BYTES):
        chunk = buffer[: min(SPAN_BYTES, info.end - at)]
        found = file.file.read_into(chunk.data, at)
        if found < len(chunk):
            raise file.ends_early(at + found)
        values = np.abs(to_float32(chunk.view(f"u{info.dtype.itemsize}"), info.dtype))
        bad = ~np.isfinite(values)
        if bad.any():
            if not count:
                first = (at - info.begin) // info.dtype.itemsize + int(bad.argmax())
            count += int(np.count_nonzero(bad))
        else:
            largest = max(largest, float(values.max()))
    return largest, first, count
