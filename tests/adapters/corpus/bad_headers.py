"""Adapters whose tensor file has a header that does not describe it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_multilora.adapters.problems import Code

from .cases import Change, add_bad
from .draft import Q0, WEIGHTS, files, name_of
from .headers import rewrite

A, B = name_of(Q0, "A"), name_of(Q0, "B")
NOT_JSON, ENTRY, OFFSETS = Code.HEADER_NOT_JSON, Code.HEADER_ENTRY, Code.HEADER_OFFSETS
PLACE = "begins at byte", "where the tensor before it ends"


def header(change: Callable[[dict[str, Any]], Any] | bytes) -> Change:
    """A header that is changed, or replaced."""
    if isinstance(change, bytes):
        return lambda draft: rewrite(draft, lambda _: change)
    return lambda draft: rewrite(draft, change)


def entry(**keys: object) -> Change:
    """Changed keys of one tensor's entry."""
    return header(lambda found: found[A].update(keys))


def longer_than_the_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + content[8:])


def huge(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((60 << 20).to_bytes(8, "little"))
    os.truncate(folder / WEIGHTS, 70 << 20)  # holes: nothing is written


def without_types(found: dict[str, Any]) -> None:
    for name in (A, B):
        found[name]["dtype"] = None


def overlapping(found: dict[str, Any]) -> None:
    same = [entry for entry in found.values() if entry.get("shape") == [8, 96]]
    same[1]["data_offsets"] = same[0]["data_offsets"]


add_bad(
    WEIGHTS,
    {
        "header-longer-than-the-file": (
            files(longer_than_the_file),
            *(Code.NOT_SAFETENSORS, "its header should have", "truncated"),
        ),
        "header-huge": (files(huge), Code.HEADER_TOO_LARGE, "a header of", "at most"),
        "header-not-json": (header(b"{'single': 'quotes'}"), NOT_JSON, "not valid JSON"),
        "header-not-text": (header(b"\xff\xfe"), NOT_JSON, "not valid JSON"),
        "header-nested-without-end": (header(b'{"a":' * 100_000), NOT_JSON, "not valid JSON"),
        "header-with-a-giant-number": (
            header(b'{"a":' + b"9" * 5_000 + b"}"),
            *(NOT_JSON, "not valid JSON"),
        ),
        "header-a-list": (header(b"[1]"), NOT_JSON, "a JSON list", "an object"),
        "header-with-a-name-twice": (
            header(b'{"twice": {}, "twice": {}}'),
            *(NOT_JSON, "'twice' occurs twice"),
        ),
        "entry-a-text": (
            header(lambda found: found | {A: "weights"}),
            *(ENTRY, A, "found 'weights'", "an object"),
        ),
        "entry-of-an-unknown-dtype": (entry(dtype="Q4"), ENTRY, A, "dtype is 'Q4'", "one of"),
        "entry-of-a-list-of-dtypes": (entry(dtype=["F32"]), ENTRY, A, "dtype is"),
        "entry-with-a-negative-size": (
            entry(shape=[-8, 96]),
            *(ENTRY, A, "shape is [-8, 96]", "a list of sizes"),
        ),
        "entry-with-a-boolean-size": (entry(shape=[True, 96]), ENTRY, A, "shape is"),
        "entry-with-an-astronomic-shape": (
            entry(shape=[2**60, 2**60]),
            *(ENTRY, A, "span 3072 bytes", "expected"),
        ),
        "entry-with-ten-thousand-dimensions": (
            entry(shape=[1] * 10_000),
            *(ENTRY, A, "shape is", "a list of sizes"),
        ),
        "entry-shorter-than-its-shape": (
            entry(data_offsets=[0, 8]),
            *(ENTRY, A, "span 8 bytes, expected 3072"),
        ),
        "entry-that-ends-before-it-begins": (
            entry(data_offsets=[8, 0]),
            *(ENTRY, A, "data_offsets are [8, 0]", "[begin, end]"),
        ),
        "entry-with-three-offsets": (entry(data_offsets=[0, 8, 9]), ENTRY, A, "[begin, end]"),
        "entry-with-fractions": (entry(data_offsets=[0.0, 3072.0]), ENTRY, A, "[begin, end]"),
        "entries-without-types": (header(without_types), (ENTRY, ENTRY), A, "dtype is None"),
        "tensors-that-overlap": (header(overlapping), OFFSETS, *PLACE),
        "tensors-with-a-gap": (
            header(lambda found: {name: each for name, each in found.items() if name != A}),
            *(OFFSETS, *PLACE),
        ),
    },
)
