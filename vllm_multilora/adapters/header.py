"""The header of a safetensors file: which tensors it holds, of which types and where.

The format: 8 bytes, the header's length (little endian); the header, a JSON object from tensor
names to `dtype`, `shape` and `data_offsets` (first byte, one past the last, counted from the
header's end); then the tensors, row-major and without gaps. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from vllm_multilora.adapters.errors import AdapterFormatError, AdapterReadError
from vllm_multilora.adapters.limits import Limits
from vllm_multilora.adapters.problems import Code, Problem, shown, shown_name

LENGTH_BYTES = 8

_MOST_DIMENSIONS = 64  # bounds the time that multiplying a hostile shape takes
_MOST_NAME = 1000  # characters; real ones have about a hundred
_MOST_ENTRY_PROBLEMS = 20
_SAVE_AGAIN = "copy or save the adapter again"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
# What else people put under the name of a safetensors file, by its first bytes.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes; convert it with safetensors.torch",
    b"\x80": "a Python pickle; convert it with safetensors.torch",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with 'git lfs pull'",
    b"<": "an HTML or XML page: the download went wrong",
    b"GGUF": "a GGUF file: save the adapter with PEFT",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in the file.

    Attributes:
        dtype: Its type.
        shape: Its shape.
        begin: Its first byte, counted from the file's beginning.
        end: One past its last byte.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(descriptor: int, size: int, file: str, limits: Limits) -> dict[str, TensorInfo]:
    """Reads a header and checks that the file is as it says.

    Args:
        descriptor: The open file.
        size: Its bytes.
        file: What problems call it, such as its path.
        limits: What is read at most.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        AdapterFormatError: The file is no safetensors file, damaged, or its header too large.
        AdapterReadError: The file cannot be read.
    """
    header, start = _parse(descriptor, size, file, limits)
    header.pop("__metadata__", None)
    if len(header) > limits.tensors:
        raise AdapterFormatError.of(
            Problem.at(
                Code.TOO_MANY_TENSORS,
                file,
                "",
                f"{len(header)} tensors",
                f"at most {limits.tensors}",
                verb="has",
            )
        )
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, entry in header.items():
        found = _tensor(name, entry, start, file)
        if isinstance(found, TensorInfo):
            tensors[name] = found
        else:
            problems.append(found)
            if len(problems) == _MOST_ENTRY_PROBLEMS:
                break
    if not problems:
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        problems = list(_gaps(tensors, start, size, file))
    if problems:
        raise AdapterFormatError.of(*problems)
    return tensors


def _parse(descriptor: int, size: int, file: str, limits: Limits) -> tuple[dict[str, Any], int]:
    """The header's JSON, and where it ends."""
    prefix = _read(descriptor, LENGTH_BYTES, 0, size, file)
    length = int.from_bytes(prefix, "little")
    possible = size - LENGTH_BYTES
    if length > possible:
        other = _other_format(descriptor)
        raise AdapterFormatError.of(
            Problem.at(
                Code.NOT_SAFETENSORS,
                file,
                "",
                f"{other or 'no safetensors file, or was truncated'}: its header should have "
                f"{length} bytes, and at most {possible} are possible in a file of {size} bytes",
                "a safetensors file",
                hint="" if other else _SAVE_AGAIN,
            )
        )
    if length > limits.header_bytes:
        raise AdapterFormatError.of(
            Problem.at(
                Code.HEADER_TOO_LARGE,
                file,
                "",
                f"a header of {length} bytes",
                f"at most {limits.header_bytes}",
                verb="has",
            )
        )
    text = _read(descriptor, length, LENGTH_BYTES, size, file)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        problem = Problem.at(
            Code.HEADER_NOT_JSON,
            file,
            "",
            f"a header that is not valid JSON: {shown_name(str(error))}",
            "a JSON object",
            verb="has",
            hint=_SAVE_AGAIN,
        )
        raise AdapterFormatError.of(problem) from None
    if not isinstance(header, dict):
        raise AdapterFormatError.of(
            Problem.at(
                Code.HEADER_NOT_JSON,
                file,
                "",
                f"a JSON {type(header).__name__}",
                "an object",
                verb="has a header that is",
            )
        )
    return header, LENGTH_BYTES + length


def _read(descriptor: int, count: int, at: int, size: int, file: str) -> bytes:
    try:
        content = os.pread(descriptor, count, at)
    except OSError as error:
        problem = Problem.at(
            Code.FILE_UNREADABLE,
            file,
            "",
            f"unreadable ({error.strerror})",
            "a readable file",
        )
        raise AdapterReadError.of(problem) from error
    if len(content) < count:
        raise AdapterFormatError.of(
            Problem.at(
                Code.NOT_SAFETENSORS,
                file,
                "",
                f"no safetensors file: it has {size} bytes and ends inside the header",
                "a safetensors file",
                hint=_SAVE_AGAIN,
            )
        )
    return content


def _other_format(descriptor: int) -> str | None:
    most = max(map(len, _OTHER_FORMATS))
    try:
        beginning = os.pread(descriptor, most, 0)
    except OSError:
        return None
    return next(
        (name for magic, name in _OTHER_FORMATS.items() if beginning.startswith(magic)), None
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {shown(counts.most_common(1)[0][0])} occurs twice")
    return found


def _tensor(name: str, entry: Any, start: int, file: str) -> TensorInfo | Problem:
    def wrong(found: str, expected: str) -> Problem:
        message = f"{file}: the header's entry of {shown_name(name)}: {found}, expected {expected}"
        return Problem(Code.HEADER_ENTRY, file, shown_name(name), found, expected, message)

    if len(name) > _MOST_NAME:
        return wrong(f"a name of {len(name)} characters", f"at most {_MOST_NAME}")
    if not isinstance(entry, dict):
        return wrong(f"found {shown(entry)}", "an object")
    dtype, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return wrong(f"dtype is {shown(dtype)}", f"one of {', '.join(_DTYPES)}")
    if not _are_sizes(shape):
        return wrong(f"shape is {shown(shape)}", "a list of sizes")
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        return wrong(f"data_offsets are {shown(span)}", "[begin, end]")
    kind = _DTYPES[dtype]
    expected = math.prod(shape) * kind.itemsize
    if span[1] - span[0] != expected:
        return wrong(
            f"data_offsets {span} span {span[1] - span[0]} bytes",
            f"{expected} for {dtype} {shown(shape)}",
        )
    return TensorInfo(kind, tuple(shape), start + span[0], start + span[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        return False
    return all(type(size) is int and 0 <= size < 2**63 for size in value)


def _gaps(tensors: Mapping[str, TensorInfo], start: int, size: int, file: str) -> Iterator[Problem]:
    """The first place where the tensors do not lie one after another up to the file's end."""
    at = start
    for name, info in tensors.items():
        if info.begin != at:
            yield Problem.at(
                Code.HEADER_OFFSETS,
                file,
                shown_name(name),
                f"at byte {info.begin - start} of the data",
                f"{at - start}, where the tensor before it ends",
                verb="begins",
                hint=_SAVE_AGAIN,
            )
            return
        at = info.end
    if at != size:
        yield Problem.at(
            Code.FILE_SIZE,
            file,
            "",
            f"{size} bytes",
            f"{at} from its header",
            verb="has",
            hint="it was truncated or written to: copy or save the adapter again",
        )
