"""Adapters whose tensor file has a header that does not describe it."""

from pathlib import Path
from typing import Any

from vllm_multilora.adapters.problems import Code

from .cases import bad_weights
from .draft import Q0, WEIGHTS, Draft, name_of
from .headers import join, rewrite, set_entry, split

A = name_of(Q0, "A")


def _replace(draft: Draft, header: bytes) -> None:
    def step(folder: Path) -> None:
        _, data = split((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).write_bytes(join(header, data))

    draft.afterwards.append(step)


@bad_weights(Code.NOT_SAFETENSORS, words=("its header should have", "truncated"))
def header_longer_than_the_file(draft: Draft) -> None:
    def step(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + content[8:])

    draft.afterwards.append(step)


@bad_weights(Code.HEADER_TOO_LARGE, words=("a header of", "at most"))
def header_huge(draft: Draft) -> None:
    def step(folder: Path) -> None:
        with (folder / WEIGHTS).open("wb") as file:
            file.write((60 << 20).to_bytes(8, "little"))
            file.truncate(70 << 20)  # holes: nothing is written

    draft.afterwards.append(step)


@bad_weights(Code.HEADER_NOT_JSON, words=("not valid JSON",))
def header_not_json(draft: Draft) -> None:
    _replace(draft, b"{'single': 'quotes'}")


@bad_weights(Code.HEADER_NOT_JSON, words=("not valid JSON",))
def header_nested_without_end(draft: Draft) -> None:
    _replace(draft, b'{"a":' * 100_000)


@bad_weights(Code.HEADER_NOT_JSON, words=("a JSON list", "an object"))
def header_a_list(draft: Draft) -> None:
    rewrite(draft, lambda header: list(header))


@bad_weights(Code.HEADER_NOT_JSON, words=("'twice' occurs twice",))
def header_with_a_name_twice(draft: Draft) -> None:
    _replace(draft, b'{"twice": {}, "twice": {}}')


@bad_weights(Code.HEADER_ENTRY, words=(A, "found 'weights'", "an object"))
def entry_a_text(draft: Draft) -> None:
    def change(header: dict[str, Any]) -> None:
        header[A] = "weights"

    rewrite(draft, change)


@bad_weights(Code.HEADER_ENTRY, words=(A, "dtype is 'Q4_K'", "one of"))
def entry_of_an_unknown_dtype(draft: Draft) -> None:
    set_entry(draft, A, dtype="Q4_K")


@bad_weights(Code.HEADER_ENTRY, words=(A, "shape is [-8, 96]", "a list of sizes"))
def entry_with_a_negative_size(draft: Draft) -> None:
    set_entry(draft, A, shape=[-8, 96])


@bad_weights(Code.HEADER_ENTRY, words=(A, "span 3072 bytes", "expected"))
def entry_with_an_astronomic_shape(draft: Draft) -> None:
    set_entry(draft, A, shape=[2**60, 2**60])


@bad_weights(Code.HEADER_ENTRY, words=(A, "shape is", "a list of sizes"))
def entry_with_ten_thousand_dimensions(draft: Draft) -> None:
    set_entry(draft, A, shape=[1] * 10_000)


@bad_weights(Code.HEADER_ENTRY, words=(A, "span 8 bytes, expected 3072"))
def entry_shorter_than_its_shape(draft: Draft) -> None:
    set_entry(draft, A, data_offsets=[0, 8])


@bad_weights(Code.HEADER_ENTRY, words=(A, "data_offsets are [8, 0]", "[begin, end]"))
def entry_that_ends_before_it_begins(draft: Draft) -> None:
    set_entry(draft, A, data_offsets=[8, 0])


@bad_weights(Code.HEADER_ENTRY, Code.HEADER_ENTRY, words=(A, "dtype is None"))
def entries_without_types(draft: Draft) -> None:
    set_entry(draft, A, dtype=None)
    set_entry(draft, name_of(Q0, "B"), dtype=None)


@bad_weights(Code.HEADER_OFFSETS, words=("begins at byte", "where the tensor before it ends"))
def tensors_that_overlap(draft: Draft) -> None:
    def change(header: dict[str, Any]) -> None:
        same = [entry for entry in header.values() if entry.get("shape") == [8, 96]]
        same[1]["data_offsets"] = same[0]["data_offsets"]

    rewrite(draft, change)


@bad_weights(Code.HEADER_OFFSETS, words=("begins at byte", "where the tensor before it ends"))
def tensors_with_a_gap(draft: Draft) -> None:
    rewrite(draft, lambda header: {n: e for n, e in header.items() if n != A})
