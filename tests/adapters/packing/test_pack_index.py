"""The index of a pack: comes back as it was, and has one size whatever it says of places."""

import numpy as np
import pytest

from multilora_kernels.dtypes import BFLOAT16, FLOAT32
from vllm_multilora.adapters.packing.pack_index import PackIndex, RankIndex, RawTensor


def index(place: int = 0) -> PackIndex:
    def rank(n: int) -> RankIndex:
        numbers = np.arange(n, dtype=np.int32)
        places = np.full(n, place, np.int64)
        return RankIndex(numbers, numbers + 4, numbers + 2, places, places + 64, places + 128)

    tensors = {
        "a": RawTensor(BFLOAT16, (3, 4), place, 3, 22.6),
        "ü": RawTensor(FLOAT32, (), place + 1),
    }
    return PackIndex((rank(3), rank(0), rank(700)), tensors, '{"r": 8}')


def test_an_index_comes_back_as_it_was():
    sent = index((5 << 40) | 12345)
    found = PackIndex.decode(sent.encode() + b"what lies after it")
    assert found.tensors == sent.tensors
    assert found.config == sent.config
    for a, b in zip(found.ranks, sent.ranks, strict=True):
        for name in ("rows", "ranks", "a_ranks", "a_places", "b_places", "magnitude_places"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            assert x.tolist() == y.tolist()


def test_its_size_does_not_depend_on_places():
    assert len({len(index(place).encode()) for place in (0, 127, 1 << 40, (1 << 62) - 65)}) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (100).to_bytes(8, "little") + b"short",
        (1).to_bytes(8, "little") + b"\xc0",
        (4).to_bytes(8, "little") + b"\x94\x90\x90\xc4",
    ],
    ids=["empty", "no-length", "short", "null", "cut"],
)
def test_what_is_no_index_is_refused(content):
    with pytest.raises(ValueError, match="index"):
        PackIndex.decode(content)


def test_columns_of_different_lengths_and_unknown_types_are_refused():
    rank = index().ranks[0]
    uneven = rank._replace(rows=rank.rows[:2])
    with pytest.raises(ValueError, match="different lengths"):
        PackIndex.decode(PackIndex((uneven,)).encode())
    content = index().encode().replace(b"bfloat16", b"complex9")
    with pytest.raises(ValueError, match="complex9"):
        PackIndex.decode(content)
