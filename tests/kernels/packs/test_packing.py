"""Packing pieces of a span: each backend against plain indexing and PyTorch's conversions."""

import ctypes
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from multilora_kernels.dtypes import BFLOAT16, FLOAT16, FLOAT32, KERNEL_DTYPES
from multilora_kernels.native.compiler import NativeUnavailableError
from multilora_kernels.packs import packing
from multilora_kernels.packs.packing import (
    CONVERT,
    PIECE,
    RAW,
    TRANSPOSE,
    PieceTable,
    largest_number,
)

BACKENDS = ("native", "numpy")
# Ties, the largest and smallest numbers, and what lies past them.
SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, 65504.0, 65520.0, 3.4e38, 1e-40, 6e-8, 2.9e-8]
SPECIAL += [float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 2049.0, 3.3961775e38, 1.1e-41]
MARGIN = 24  # bytes before a matrix in its span, which no dtype's width divides


class Target:
    """Memory that is poisoned, with a matrix of elements somewhere in it."""

    def __init__(self, elements: int, dtype: torch.dtype, misaligned: int = 0) -> None:
        self.memory = torch.full((elements + 64,), 7.0, dtype=dtype)
        self.start = 3 + misaligned
        self.elements = elements

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.start * self.memory.element_size()

    def assert_holds(self, expected: torch.Tensor) -> None:
        end = self.start + self.elements
        found = self.memory[self.start : end].view(expected.shape)
        kind = {4: torch.int32, 2: torch.int16}[found.element_size()]
        # Bit for bit, but for which NaN it is.
        both_nan = found.isnan() & expected.isnan()
        assert torch.all((found.view(kind) == expected.contiguous().view(kind)) | both_nan)
        rest = torch.cat((self.memory[: self.start], self.memory[end:]))
        assert torch.all(rest == 7.0)


def span_of(matrix: torch.Tensor) -> np.ndarray:
    content = matrix.contiguous().view(-1).view(torch.uint8).numpy()
    return np.concatenate((np.zeros(MARGIN + 1, np.uint8), content))


def piece(matrix: torch.Tensor, **values) -> np.ndarray:
    """The whole of a matrix in its span, with other values where they are given."""
    found = np.zeros(1, PIECE)
    kind = [d.torch for d in KERNEL_DTYPES].index(matrix.dtype)
    rows, columns = matrix.shape
    defaults = {
        "source": MARGIN + 1,
        "source_stride": columns,
        "source_dtype": kind,
        "rows": rows,
        "columns": columns,
        "target_stride": rows if values.get("kind") == TRANSPOSE else columns,
        "target_dtype": kind,
        "scale": 1.0,
    }
    for name, value in (defaults | values).items():
        found[name] = value
    return found


def pack(span: np.ndarray, pieces: np.ndarray, backend: str = "auto") -> list[bool]:
    table = PieceTable(pieces, np.array([0, len(pieces)]), np.array([len(span)]), backend=backend)
    return table.pack(0, span).tolist()


def values(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows * columns, generator=generator)
    matrix[: min(len(SPECIAL), len(matrix))] = torch.tensor(SPECIAL)[: len(matrix)]
    return matrix.view(rows, columns)


@pytest.mark.parametrize("kind", [CONVERT, TRANSPOSE], ids=["convert", "transpose"])
@pytest.mark.parametrize("to", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("source", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_converted_as_pytorch_does(backend, source, to, kind):
    """Both backends against PyTorch bit for bit, so against each other too."""
    for rows, columns in ((67, 18), (100, 8), (70, 64), (130, 129), (1, 5000), (300, 1)):
        matrix = values(rows, columns).to(source.torch)
        for scale in (1.0, 0.3, -24 / 64):
            target = Target(matrix.numel(), to.torch)
            bad = pack(
                span_of(matrix),
                piece(
                    matrix,
                    scale=scale,
                    kind=kind,
                    target=target.address,
                    target_dtype=KERNEL_DTYPES.index(to),
                ),
                backend,
            )
            expected = (matrix.float() * torch.tensor(scale, dtype=torch.float32)).to(to.torch)
            target.assert_holds(expected.T if kind == TRANSPOSE else expected)
            assert bad == [not bool(expected.isfinite().all())]


@pytest.mark.parametrize("misaligned", [0, 1, 29], ids="past-a-line-{}".format)
@pytest.mark.parametrize("kind", [CONVERT, TRANSPOSE, RAW], ids=["convert", "transpose", "raw"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_matrix_land_where_they_belong(backend, kind, misaligned):
    matrix = torch.randn(301, 150, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rows, columns in (
        (slice(0, 301), slice(0, 150)),
        (slice(7, 140), slice(3, 149)),
        (slice(5, 6), slice(2, 9)),
        (slice(5, 9), slice(4, 5)),
    ):
        part = matrix[rows, columns]
        target = Target(part.numel(), torch.bfloat16, misaligned)
        table = piece(
            matrix,
            source=MARGIN + 1 + 2 * (rows.start * 150 + columns.start),
            rows=part.size(0),
            columns=part.size(1),
            target=target.address,
            target_stride=part.size(0) if kind == TRANSPOSE else part.size(1),
            kind=kind,
            scale=-2.0,
        )
        assert pack(span_of(matrix), table, backend) == [False]
        stored = part if kind == RAW else part * -2
        target.assert_holds(stored.T if kind == TRANSPOSE else stored)


@pytest.mark.parametrize("kind", [CONVERT, TRANSPOSE], ids=["convert", "transpose"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pieces_of_a_matrix_meet_in_its_target(backend, kind):
    """As the pieces of consecutive spans do, which end between rows."""
    matrix = values(200, 24, seed=3).nan_to_num(0).half()
    target = Target(matrix.numel(), torch.float16)
    cuts = [0, 1, 31, 96, 200]
    pieces = np.concatenate(
        [
            piece(
                matrix,
                source=MARGIN + 1 + 2 * 24 * first,
                rows=last - first,
                target=target.address + 2 * first * (1 if kind == TRANSPOSE else 24),
                target_stride=200 if kind == TRANSPOSE else 24,
                kind=kind,
                scale=0.5,
            )
            for first, last in pairwise(cuts)
        ]
    )
    pack(span_of(matrix), pieces, backend)
    expected = (matrix.float() * 0.5).half()
    target.assert_holds(expected.T if kind == TRANSPOSE else expected)


@pytest.mark.parametrize("kind", [CONVERT, TRANSPOSE, RAW, "judge"], ids=str)
@pytest.mark.parametrize(
    ("value", "scale", "dtype", "bad"),
    [
        (0.0, 1e300, FLOAT32, True),  # the scale is infinite as float32, and 0 * infinity is NaN
        (1e-6, 1e44, FLOAT32, True),
        (1e-6, 1e38, FLOAT32, False),
        (3e38, 1.0, BFLOAT16, False),
        (3.4e38, 1.0, BFLOAT16, True),  # rounds up to infinity
        (65519.0, 1.0, FLOAT16, False),
        (65520.0, 1.0, FLOAT16, True),
        (65520.0, 0.5, FLOAT16, False),
        (float("nan"), 1.0, FLOAT32, True),
        (float("-inf"), 0.0, FLOAT16, True),
        (float("inf"), 1.0, BFLOAT16, True),
        (1.0, 0.0, BFLOAT16, False),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_judged_as_slots_would_hold_them(backend, kind, value, scale, dtype, bad):
    for at in (0, 4700, 9999):
        matrix = torch.zeros(100, 100)
        matrix.view(-1)[at] = value
        raw = kind == RAW
        target = Target(matrix.numel(), torch.float32 if raw else dtype.torch)
        table = piece(
            matrix,
            target=0 if kind == "judge" else target.address,
            target_dtype=KERNEL_DTYPES.index(dtype),
            kind=CONVERT if kind == "judge" else kind,
            scale=scale,
        )
        assert pack(span_of(matrix), table, backend) == [bad]
        if kind == "judge":
            assert torch.all(target.memory == 7.0)
        if raw:
            target.assert_holds(matrix)


def test_the_largest_number_of_each_dtype():
    for dtype in KERNEL_DTYPES:
        assert largest_number(dtype) == torch.finfo(dtype.torch).max


@pytest.mark.parametrize("kind", [CONVERT, TRANSPOSE, RAW], ids=["convert", "transpose", "raw"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_pieces_and_spans_without_pieces_do_nothing(backend, kind):
    matrix = torch.ones(4, 6)
    span, target = span_of(matrix), Target(24, torch.float32)
    for size in ({"rows": 0}, {"columns": 0}, {"rows": 0, "columns": 0}):
        table = piece(matrix, kind=kind, target=target.address, **size)
        assert pack(span, table, backend) == [False]
    assert torch.all(target.memory == 7.0)
    assert pack(span, np.zeros(0, PIECE), backend) == []


def test_each_span_has_its_own_pieces():
    first, second = torch.ones(4, 6), torch.full((2, 6), 5.0)
    targets = [Target(24, torch.float32), Target(12, torch.float32)]
    pieces = np.concatenate(
        [piece(m, target=t.address) for m, t in zip((first, second), targets, strict=True)]
    )
    spans = [span_of(first), span_of(second)]
    table = PieceTable(pieces, np.array([0, 1, 1, 2]), np.array([len(spans[0]), 9, len(spans[1])]))
    assert table.pieces_of(1) == (1, 1)
    table.pack(2, spans[1])
    targets[1].assert_holds(second)
    assert torch.all(targets[0].memory == 7.0)
    with pytest.raises(ValueError, match=r"span 0 must be 121 contiguous bytes, found uint8 .73."):
        table.pack(0, spans[1])


@pytest.mark.parametrize(
    "change",
    [
        {"source": 26},
        {"source": -1},
        {"source": 2**63 - 1},
        {"rows": 7},
        {"rows": 2**62},
        {"rows": -1},
        {"columns": 7},
        {"columns": 2**62, "source_stride": 2**62},
        {"source_stride": -4},
        {"source_stride": 5},
        {"source_dtype": 3},
        {"target_dtype": -1},
        {"kind": 3},
        {"target": -8},
        {"target": 64, "target_stride": 5},
        {"target": 64, "target_stride": 3, "kind": TRANSPOSE},
    ],
    ids=str,
)
def test_a_piece_that_does_not_fit_its_span_is_refused(change):
    matrix = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"piece 0 is .* does not fit its span of 121 bytes"):
        pack(span_of(matrix), piece(matrix, **change))


def test_other_arguments_are_checked():
    matrix = torch.ones(4, 6)
    span, table = span_of(matrix), piece(matrix)
    one = np.array([len(span)])
    for arguments, words in (
        ((np.zeros(1, np.int64), np.array([0, 1]), one), "contiguous .n. of PIECE"),
        ((table[None], np.array([0, 1]), one), "contiguous .n. of PIECE"),
        ((table.repeat(4)[::2], np.array([0, 2]), one), "contiguous .n. of PIECE"),
        ((table, np.array([0, 2]), one), "firsts must count up to 1 over 1 spans"),
        ((table, np.array([0, 2, 1]), one.repeat(2)), "firsts must count up"),
        ((table, np.array([0, 1]), one.repeat(2)), "firsts must count up"),
    ):
        with pytest.raises(ValueError, match=words):
            PieceTable(*arguments)
    with pytest.raises(ValueError, match="unknown backend 'x'"):
        pack(span, table, "x")
    for wrong in (span.repeat(2)[::2], span.view(np.int8)):
        with pytest.raises(ValueError, match="contiguous bytes"):
            PieceTable(table, np.array([0, 1]), one).pack(0, wrong)


def test_without_a_compiler_numpy_packs_and_says_so_once(monkeypatch, caplog):
    def unavailable() -> ctypes.CDLL:
        raise NativeUnavailableError("no C compiler found")

    monkeypatch.setattr(packing, "load_packing_library", unavailable)
    packing._best_library.cache_clear()
    try:
        matrix = torch.ones(4, 6)
        target = Target(24, torch.float32)
        for _ in range(2):
            pack(span_of(matrix), piece(matrix, target=target.address, scale=0.5))
    finally:
        packing._best_library.cache_clear()
    target.assert_holds(matrix * 0.5)
    assert [r.message for r in caplog.records if "packed by numpy" in r.message] == [
        "Adapters are packed by numpy, more slowly than by C: no C compiler found"
    ]


def test_packing_and_taking_adapters_in_import_no_torch():
    code = (
        "import sys, multilora_kernels.packs.packing, vllm_multilora.adapters.intake\n"
        "multilora_kernels.packs.packing.prepare()\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
