"""The header of a safetensors file: which tensors it holds, of which types and where.

The format: 8 bytes, the header's length (little endian); the header, a JSON object from tensor
names to `dtype`, `shape` and `data_offsets` (first byte, one past the last, counted from the
header's end); then the tensors, row-major and without gaps. https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from multilora_kernels.dtypes import SAFETENSORS_DTYPES, DType
from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.files.json_text import JsonTooLargeError, parse_json
from vllm_multilora.adapters.files.regular_file import RegularFile
from vllm_multilora.adapters.model.size_limits import SizeLimits
from vllm_multilora.adapters.problems import Code, Problem, shown, shown_name
from vllm_multilora.wording import counted

LENGTH_BYTES = 8

_MAX_DIMENSIONS = 64  # bounds the time that multiplying a hostile shape takes
_MAX_NAME = 256  # characters; real ones have about a hundred. Bounds what patterns cost
_MAX_DOTS = 32  # real ones have a dozen; bounds the time that models' own renames take
_MAX_ENTRY_PROBLEMS = 20
# An object and two lists; up to eight numbers in them and its three keys.
_PARTS_OF_A_TENSOR, _VALUES_OF_A_TENSOR = 3, 12
_METADATA_PARTS = 1 << 18  # `__metadata__` holds texts, which may be JSON themselves
_SAVE_AGAIN = "copy or save the adapter again"
# What else people put under the name of a safetensors file, by its first bytes.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes; convert it with safetensors.torch",
    b"\x80": "a Python pickle; convert it with safetensors.torch",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with 'git lfs pull'",
    b"<": "an HTML or XML page: the download went wrong",
    b"GGUF": "a GGUF file: save the adapter with PEFT",
}


class TensorInfo(NamedTuple):
    """A tensor in the file; its bytes [begin, end) are counted from the file's beginning."""

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(
    opened: RegularFile, limits: SizeLimits, show: Callable[[memoryview], object] | None = None
) -> dict[str, TensorInfo]:
    """Reads a header and checks that the file is as it says.

    `show` is called with the bytes up to the first tensor, in order, as they were read.

    Returns:
        The tensors in the order of their bytes.

    Raises:
        AdapterFormatError: The file is no safetensors file, damaged, or its header too large.
        AdapterReadError: The file cannot be read.
    """
    file, size = str(opened.path), opened.fingerprint.size
    header, start = _parse(opened, limits, show)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # which safetensors takes for none too
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFormatError.at(
            Code.HEADER_ENTRY, file, shown(metadata), "an object of texts", where="__metadata__"
        )
    if len(header) > limits.tensors:
        raise AdapterFormatError.at(
            Code.TOO_MANY_TENSORS,
            file,
            f"{len(header)} tensors",
            f"at most {limits.tensors}",
            verb="has",
        )
    tensors: dict[str, TensorInfo] = {}
    problems: list[Problem] = []
    for name, entry in header.items():
        found = _tensor(name, entry, start, file)
        if isinstance(found, TensorInfo):
            tensors[name] = found
        else:
            problems.append(found)
            if len(problems) == _MAX_ENTRY_PROBLEMS:
                break
    if not problems:
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        problems = list(_gaps(tensors, start, size, file))
    if problems:
        raise AdapterFormatError.of(*problems)
    return tensors


def _parse(
    opened: RegularFile, limits: SizeLimits, show: Callable[[memoryview], object] | None
) -> tuple[dict[str, Any], int]:
    """The header's JSON, and where it ends."""
    file, size = str(opened.path), opened.fingerprint.size
    prefix = _read(opened, LENGTH_BYTES, 0)
    length = int.from_bytes(prefix, "little")
    possible = size - LENGTH_BYTES
    if length > possible:
        beginning = opened.read(max(map(len, _OTHER_FORMATS)))
        other = next(
            (n for magic, n in _OTHER_FORMATS.items() if beginning.startswith(magic)), None
        )
        raise AdapterFormatError.at(
            Code.NOT_SAFETENSORS,
            file,
            f"{other or 'no safetensors file, or was truncated'}: its header should have "
            f"{length} bytes, and at most {possible} are possible in a file of {size} bytes",
            "a safetensors file",
            hint="" if other else _SAVE_AGAIN,
        )
    if length > limits.header_bytes:
        raise AdapterFormatError.at(
            Code.HEADER_TOO_LARGE,
            file,
            f"a header of {length} bytes",
            f"at most {limits.header_bytes}",
            verb="has",
        )
    text = _read(opened, length, LENGTH_BYTES)
    if show is not None:
        show(memoryview(prefix))
        show(memoryview(text))
    try:
        header = parse_json(
            text,
            parts=_PARTS_OF_A_TENSOR * limits.tensors + _METADATA_PARTS,
            values=_VALUES_OF_A_TENSOR * limits.tensors + _METADATA_PARTS,
            unique=True,
        )
    except JsonTooLargeError as error:
        found, most = f"a header with {error.found}", f"at most {error.most}"
        raise AdapterFormatError.at(Code.HEADER_TOO_LARGE, file, found, most, verb="has") from None
    except ValueError as error:
        raise AdapterFormatError.at(
            Code.HEADER_NOT_JSON,
            file,
            f"a header that is not valid JSON: {shown_name(str(error))}",
            "a JSON object",
            verb="has",
            hint=_SAVE_AGAIN,
        ) from None
    if not isinstance(header, dict):
        raise AdapterFormatError.at(
            Code.HEADER_NOT_JSON,
            file,
            f"a JSON {type(header).__name__}",
            "an object",
            verb="has a header that is",
        )
    return header, LENGTH_BYTES + length


def _read(opened: RegularFile, count: int, at: int) -> bytearray:
    content = opened.read(count, at)
    if len(content) < count:
        size = counted(opened.fingerprint.size, "byte")
        raise AdapterFormatError.at(
            Code.NOT_SAFETENSORS,
            str(opened.path),
            f"no safetensors file: it has {size} and ends inside the header",
            "a safetensors file",
            hint=_SAVE_AGAIN,
        )
    return content


def _tensor(name: str, entry: Any, start: int, file: str) -> TensorInfo | Problem:
    def wrong(found: str, expected: str) -> Problem:
        message = f"{file}: the header's entry of {shown_name(name)}: {found}, expected {expected}"
        return Problem(Code.HEADER_ENTRY, file, shown_name(name), found, expected, message)

    if len(name) > _MAX_NAME:
        return wrong(f"a name of {len(name)} characters", f"at most {_MAX_NAME}")
    # JSON can spell what UTF-8 cannot.
    if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
        return wrong("a name with half of a pair of surrogates", "one that UTF-8 can encode")
    if name.count(".") > _MAX_DOTS:
        return wrong(f"a name with {name.count('.')} dots", f"at most {_MAX_DOTS}")
    if not isinstance(entry, dict):
        return wrong(f"found {shown(entry)}", "an object")
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SAFETENSORS_DTYPES:
        return wrong(f"dtype is {shown(dtype)}", f"one of {', '.join(SAFETENSORS_DTYPES)}")
    if not _are_sizes(shape):
        return wrong(f"shape is {shown(shape)}", "a list of sizes")
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        return wrong(f"data_offsets are {shown(span)}", "[begin, end]")
    kind = SAFETENSORS_DTYPES[dtype]
    expected = math.prod(shape) * kind.itemsize
    if span[1] - span[0] != expected:
        return wrong(
            f"data_offsets {span} span {counted(span[1] - span[0], 'byte')}",
            f"{expected} for {dtype} {shown(shape)}",
        )
    return TensorInfo(kind, tuple(shape), start + span[0], start + span[1])


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return False
    # Without a generator: a file has two of these lists for each tensor.
    if not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= 0 and max(value) < 2**63)


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
