"""Reading blocks of a file: each backend against plain indexing and PyTorch's conversions."""

import os

import numpy as np
import pytest
import torch

from multilora_kernels import blocks, native
from multilora_kernels.blocks import BLOCK, DTYPES, BlockReadError, read_blocks, read_span

BACKENDS = ("native", "torch")
# Ties, the largest and smallest numbers, and what lies past them.
SPECIAL = [0.0, -0.0, 1.00390625, 1.01171875, 65504.0, 65520.0, 3.4e38, 1e-40, 6e-8, 2.9e-8]
SPECIAL += [float("inf"), float("-inf"), float("nan"), 1.0, -1.0, 2049.0]


@pytest.fixture
def stored(tmp_path):
    """Opens a file with a tensor's bytes after 24 others."""
    opened = []

    def store(tensor: torch.Tensor) -> int:
        path = tmp_path / f"{len(opened)}"
        path.write_bytes(
            bytes(24) + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1]

    yield store
    for descriptor in opened:
        os.close(descriptor)


def block(matrix: torch.Tensor, rows: slice, columns: slice, target: int = 0, **more) -> tuple:
    width = matrix.size(1)
    first = 24 + (rows.start * width + columns.start) * matrix.element_size()
    kind = DTYPES.index(matrix.dtype)
    size = (rows.stop - rows.start, columns.stop - columns.start)
    values = {"transposed": 0, "scale": 1.0} | more
    return (first, width, kind, *size, target, values["transposed"], values["scale"])


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_converted_as_pytorch_does(stored, backend, source, to, transposed):
    values = torch.cat([torch.tensor(SPECIAL), torch.randn(65 * 18 - len(SPECIAL))])
    matrix = values.reshape(65, 18).to(source)
    for scale in (1.0, 0.3):
        table = np.array(
            [block(matrix, slice(0, 65), slice(0, 18), scale=scale, transposed=transposed)], BLOCK
        )
        buffer = torch.zeros(matrix.numel(), dtype=to)
        read_blocks(stored(matrix), table, buffer, backend=backend)
        expected = (matrix.float() * scale).to(to)
        expected = expected.T if transposed else expected
        assert torch.equal(buffer.view(expected.shape).nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_matrix_land_where_they_belong(stored, backend, threads):
    """Odd sizes, one longer than the scratch; the buffer between the blocks stays as it was."""
    matrix = torch.randn(9001, 21)
    cuts = [
        (slice(0, 9001), slice(0, 21), 0),
        (slice(0, 9001), slice(0, 21), 1),
        (slice(7, 140), slice(0, 21), 1),
        (slice(7, 140), slice(3, 20), 0),
        (slice(7, 140), slice(3, 20), 1),
        (slice(5, 6), slice(2, 9), 1),
        (slice(5, 9), slice(4, 5), 1),
        (slice(3, 3), slice(0, 21), 0),
    ]
    table, at, expected = [], 5, {}
    for rows, columns, transposed in cuts:
        for scale in (1.0, -2.0):
            table.append(block(matrix, rows, columns, at, transposed=transposed, scale=scale))
            part = matrix[rows, columns] * scale
            expected[at] = (part.T if transposed else part).reshape(-1)
            at += part.numel() + 5
    buffer = torch.full((at,), 7.0)
    wanted = buffer.clone()
    for start, part in expected.items():
        wanted[start : start + part.numel()] = part
    read_blocks(stored(matrix), np.array(table, BLOCK), buffer, threads=threads, backend=backend)
    assert torch.equal(buffer, wanted)


def test_without_a_compiler_pytorch_reads(stored, monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(blocks, "load_releasing_library", pytest.fail)
    matrix = torch.randn(6, 4)
    buffer = torch.zeros(24)
    table = np.array([block(matrix, slice(0, 6), slice(0, 4), scale=0.5)], BLOCK)
    read_blocks(stored(matrix), table, buffer)
    assert torch.equal(buffer.view(6, 4), matrix * 0.5)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_file_that_ends_early_names_the_block(stored, backend, transposed):
    matrix = torch.randn(6, 4)
    table = np.array([block(matrix, slice(i, i + 2), slice(0, 4), 8 * i) for i in (0, 2, 4)], BLOCK)
    table["transposed"] = transposed
    with pytest.raises(BlockReadError, match="ends early") as caught:
        read_blocks(stored(matrix[:4]), table, torch.zeros(99), backend=backend)
    assert caught.value.block == 2
    assert caught.value.ends_early


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_read_gives_the_systems_reason(tmp_path, backend):
    matrix = torch.randn(6, 4)
    table = np.array([block(matrix, slice(0, 6), slice(0, 4))], BLOCK)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BlockReadError, match="Is a directory") as caught:
        read_blocks(descriptor, table, torch.zeros(24), backend=backend)
    os.close(descriptor)
    assert not caught.value.ends_early


@pytest.mark.parametrize(
    "change",
    [
        {"target": 1},
        {"target": -1},
        {"target": 2**63 - 1},
        {"rows": 7},
        {"rows": 2**62},
        {"columns": 5},
        {"dtype": 3},
    ],
    ids=str,
)
def test_a_block_outside_the_buffer_is_refused(stored, change):
    matrix = torch.randn(6, 4)
    table = np.array([block(matrix, slice(0, 6), slice(0, 4))], BLOCK)
    for field, value in change.items():
        table[field] = value
    with pytest.raises(ValueError, match=r"block 0 is .* does not fit a buffer of 24 elements"):
        read_blocks(stored(matrix), table, torch.zeros(24))


def test_other_arguments_are_checked(stored):
    matrix = torch.randn(6, 4)
    table = np.array([block(matrix, slice(0, 6), slice(0, 4))], BLOCK)
    for arguments, words in (
        ((np.zeros((1, 8), np.int64), torch.zeros(24)), "contiguous .n. of BLOCK"),
        ((table, torch.zeros(24, dtype=torch.float64)), "found torch.float64"),
        ((table, torch.zeros(4, 6)), "must be a vector"),
        ((table, torch.zeros(48)[::2]), "must be contiguous"),
    ):
        with pytest.raises(ValueError, match=words):
            read_blocks(stored(matrix), *arguments)
    with pytest.raises(ValueError, match="at least one thread is needed, found 0"):
        read_blocks(stored(matrix), table, torch.zeros(24), threads=0)
    with pytest.raises(ValueError, match="unknown backend 'x'"):
        read_blocks(stored(matrix), table, torch.zeros(24), backend="x")


def test_a_span_is_read_as_it_lies(stored):
    matrix = torch.randn(6, 4)
    found = torch.zeros(2, 4)
    assert read_span(stored(matrix), 24 + 16, found)
    assert torch.equal(found, matrix[1:3])
    assert not read_span(stored(matrix), 24 + 80, found)
    assert read_span(stored(matrix), 0, torch.zeros(0, 4))
