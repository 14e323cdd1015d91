"""Filling a slot: each backend against a loop; nothing but the true ranks is written."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from multilora_kernels import SlotIndex, SlotTable, column_major, native
from multilora_kernels.packs import device_staging, pieces, scatter
from multilora_kernels.packs.device_staging import SEGMENT_ALIGNMENT, _arranged
from multilora_kernels.packs.pieces import PIECE

SLOTS, MAX_RANK = 3, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton") if DEVICE == "cuda" else ("native", "torch", "triton")
# K and N of the slices; the second has pieces of many pages, which are copied in another way.
SHAPES = ((24, 40), (1500, 24), (70, 3), (8, 8), (1, 1))
POISON = 9.0


@dataclass
class Model:
    """Poisoned slots."""

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]

    @property
    def table(self) -> SlotTable:
        return SlotTable(self.lora_a, self.lora_b)

    def clone(self) -> "Model":
        return Model([a.clone() for a in self.lora_a], [b.clone() for b in self.lora_b])


def make_model(dtype=torch.bfloat16, columns=(False,) * 5, a_rows=MAX_RANK) -> Model:
    def filled(*shape: int) -> torch.Tensor:
        return torch.full((SLOTS, 1, *shape), POISON, dtype=dtype, device=DEVICE)

    lora_b = []
    for (_, outputs), by_column in zip(SHAPES, columns, strict=True):
        b = filled(outputs, MAX_RANK)
        lora_b.append(column_major(b).fill_(POISON) if by_column else b)
    return Model([filled(a_rows, inputs) for inputs, _ in SHAPES], lora_b)


def make_adapter(model: Model, ranks: dict[int, int], a_ranks: dict[int, int] | None = None):
    """An index of matrices in a buffer with gaps; the matrices by row, and the buffer."""
    a_ranks = ranks if a_ranks is None else a_ranks
    pieces, matrices, index, at = [], {}, [], 0
    generator = torch.Generator().manual_seed(1)
    dtype = model.lora_a[0].dtype
    for row, rank in ranks.items():
        inputs, outputs = SHAPES[row]
        a = torch.randn(a_ranks[row], inputs, generator=generator).to(dtype)
        b = torch.randn(outputs, rank, generator=generator).to(dtype)
        by_column = model.lora_b[row].stride(-1) != 1
        offsets = []
        for matrix in (a, b.T if by_column else b):
            gap = torch.full((7,), float("nan"), dtype=dtype)
            pieces += [gap, matrix.reshape(-1)]
            offsets.append(at + len(gap))
            at += len(gap) + matrix.numel()
        matrices[row] = (a, b)
        index.append((row, a_ranks[row], rank, *offsets))
    buffer = torch.cat(pieces) if pieces else torch.empty(0, dtype=dtype)
    columns = np.array(index, np.int64).reshape(-1, 5).T
    addresses = buffer.data_ptr() + columns[3:] * dtype.itemsize
    return SlotIndex(*columns[:3].astype(np.int32), *addresses), matrices, buffer


def expected_after(model: Model, slot: int, matrices) -> Model:
    expected = model.clone()
    for row, (a, b) in matrices.items():
        expected.lora_a[row][slot, 0, : a.size(0)] = a.to(DEVICE)
        expected.lora_b[row][slot, 0, :, : b.size(1)] = b.to(DEVICE)
    return expected


def assert_same(found: Model, expected: Model) -> None:
    for name in ("lora_a", "lora_b"):
        for i, (x, y) in enumerate(zip(getattr(found, name), getattr(expected, name), strict=True)):
            assert torch.equal(x, y), f"{name}[{i}]"


BY_ROW, BY_COLUMN, MIXED = (False,) * 5, (True,) * 5, (True, False, True, False, True)
ODD = {0: 5, 1: 3, 2: 1, 3: 7, 4: 16}


@pytest.mark.parametrize(
    ("ranks", "columns", "dtype"),
    [
        pytest.param(dict.fromkeys(range(5), MAX_RANK), BY_ROW, torch.bfloat16, id="full"),
        pytest.param(dict.fromkeys(range(5), 8), BY_COLUMN, torch.float16, id="even"),
        pytest.param(ODD, MIXED, torch.bfloat16, id="odd"),
        pytest.param(ODD, BY_ROW, torch.float32, id="odd-by-row"),
        pytest.param({3: 4, 1: 2}, BY_ROW, torch.float16, id="missing-slices"),
        pytest.param({0: 0, 1: 6}, BY_COLUMN, torch.float32, id="rank-0"),
        pytest.param({}, MIXED, torch.bfloat16, id="empty"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_fills_its_slot_and_nothing_else(backend, ranks, columns, dtype):
    model = make_model(dtype, columns)
    index, matrices, _buffer = make_adapter(model, ranks)
    expected = expected_after(model, 1, matrices)
    model.table.scatter(1, index, backend=backend)
    assert_same(model, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sharded_rank_fills_fewer_rows_of_a(backend):
    model = make_model(a_rows=4)
    index, matrices, _buffer = make_adapter(model, {0: 6, 1: 3}, {0: 4, 1: 0})
    expected = expected_after(model, 0, matrices)
    model.table.scatter(0, index, backend=backend)
    assert_same(model, expected)


def test_one_table_serves_every_slot():
    model = make_model(columns=(True,) * 5)
    table, expected = model.table, model.clone()
    for slot in (2, 0, 1, 2):
        index, matrices, _buffer = make_adapter(model, {slot: 4 + slot, 4: 2})
        table.scatter(slot, index)
        expected = expected_after(expected, slot, matrices)
    assert_same(model, expected)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU needs no compiler")
def test_without_a_compiler_pytorch_copies(monkeypatch):
    monkeypatch.setattr(native, "is_available", lambda: False)
    monkeypatch.setattr(scatter, "load_releasing_library", pytest.fail)
    model = make_model(columns=(True,) * 5)
    index, matrices, _buffer = make_adapter(model, {0: 5, 3: 8})
    expected = expected_after(model, 1, matrices)
    model.table.scatter(1, index)
    assert_same(model, expected)


def test_slots_without_the_extra_dimension_do_too():
    model = make_model()
    flat = Model([a[:, 0] for a in model.lora_a], [b[:, 0] for b in model.lora_b])
    index, matrices, _buffer = make_adapter(model, {0: 5, 3: 8})
    expected = expected_after(model, 1, matrices)
    flat.table.scatter(1, index)
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("most_bytes", "columns"),
    [(1, BY_ROW), (100, BY_COLUMN), (3000, BY_ROW), (1 << 20, BY_COLUMN)],
    ids=["row-by-row", "columns", "rows", "whole"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_any_size_hold_every_row_once(backend, columns, most_bytes):
    """Group by group, so that others may use the memory in between."""
    model = make_model(columns=columns)
    index, matrices, _buffer = make_adapter(model, {0: 5, 1: 16, 2: 7, 4: 3})
    expected = expected_after(model, 2, matrices)
    table = model.table
    groups = table.pieces(2, index, most_bytes=most_bytes)
    assert sum(group.nbytes for group in groups) == 2 * sum(
        a.numel() + b.numel() for a, b in matrices.values()
    )
    for group in groups:
        longest_row = int(group.pieces["row_bytes"].max())
        assert group.nbytes <= max(most_bytes, longest_row)
    for group in groups[::-1]:
        table.copy(group, backend=backend)
    assert_same(model, expected)


def test_a_group_has_no_more_pieces_than_staging_memory_has_room_for():
    model = make_model()
    index, matrices, _buffer = make_adapter(model, {4: 1})
    often = SlotIndex(
        *(column.repeat(pieces.MAX_PIECES // 2 + 1) for column in vars(index).values())
    )
    groups = model.table.pieces(1, often)
    assert [len(group.pieces) for group in groups] == [pieces.MAX_PIECES, 2]
    expected = expected_after(model, 1, matrices)
    model.table.scatter(1, often, backend="triton")
    assert_same(model, expected)


def test_an_adapter_without_slices_has_no_groups():
    model = make_model()
    index, _, _buffer = make_adapter(model, {})
    assert model.table.pieces(0, index) == []


def test_staging_memory_is_used_in_turn_however_many_groups_there_are():
    """Two halves of the smallest size, filled again and again; what is copied is what is there."""
    model = make_model()
    table = SlotTable(model.lora_a, model.lora_b, staging_bytes=2 * (2048 * 40 + 8192))
    index, matrices, _buffer = make_adapter(model, {0: 5, 1: 16, 2: 7, 3: 8})
    expected = expected_after(model, 1, matrices)
    for group in table.pieces(1, index, most_bytes=4000):
        table.copy(group, backend="triton")
    assert_same(model, expected)
    [whole] = table.pieces(1, index)
    with pytest.raises(ValueError, match="does not fit the staging memory"):
        table.copy(whole, backend="triton")
    with pytest.raises(ValueError, match="staging needs more than"):
        SlotTable(model.lora_a, model.lora_b, staging_bytes=4096).copy(whole, backend="triton")


def test_what_lies_together_is_staged_in_one_copy():
    pieces = np.zeros(6, PIECE)
    pieces["rows"] = 1
    # Two that touch, one after a gap of less than a line; one far away; one that begins a segment.
    pieces["source"] = [640, 704, 800, 3000, SEGMENT_ALIGNMENT - 10, SEGMENT_ALIGNMENT]
    pieces["row_bytes"] = [64, 40, 8, 3, 10, 64]
    offsets, runs, end = _arranged(pieces[[3, 0, 5, 2, 1, 4]])
    assert [(address, size) for address, _, size in runs] == [
        (640, 168),
        (3000, 3),
        (SEGMENT_ALIGNMENT - 10, 10),
        (SEGMENT_ALIGNMENT, 64),
    ]
    assert all(offset % 64 == address % 64 for address, offset, _ in runs)
    assert (offsets[1], offsets[4], offsets[3]) == (0, 64, 160)
    assert end == runs[-1][1] + 64


def test_warming_up_a_cpu_does_nothing():
    model = make_model()
    expected = model.clone()
    model.table.warm_up()
    assert_same(model, expected)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rows", 5, r"rows must lie in \[0, 5\)"),
        ("rows", -1, r"rows must lie in \[0, 5\)"),
        ("a_ranks", 17, "a_ranks .17, 4. do not fit the slots, which hold .16, 16."),
        ("ranks", 17, "ranks .17, 4. do not fit"),
        ("ranks", -1, "ranks .-1, 4. do not fit"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(field, value, words):
    model = make_model()
    index, _, _buffer = make_adapter(model, {0: 4, 1: 4})
    getattr(index, field)[0] = value
    expected = model.clone()
    with pytest.raises(ValueError, match=words):
        model.table.scatter(1, index)
    assert_same(model, expected)


def test_other_arguments_are_checked():
    model = make_model()
    index, _, _buffer = make_adapter(model, {0: 4})
    uneven = replace(index, b_addresses=index.b_addresses.repeat(2))
    square = SlotIndex(*(column[None] for column in vars(index).values()))
    for arguments, words in (
        ((3, index), "there is no slot 3: found 3 slots"),
        ((-1, index), "there is no slot -1"),
        ((0, uneven), "five vectors of one length"),
        ((0, square), "five vectors of one length"),
    ):
        with pytest.raises(ValueError, match=words):
            model.table.scatter(*arguments)
    with pytest.raises(ValueError, match="unknown backend 'x'"):
        model.table.scatter(0, index, backend="x")
    with pytest.raises(ValueError, match="at least one byte"):
        model.table.pieces(0, index, most_bytes=0)


def test_slots_that_do_not_belong_together_are_refused():
    a, b = torch.zeros(2, 4, 8), torch.zeros(2, 6, 4)
    for lora_a, lora_b, words in (
        ([], [], "at least one"),
        ([a], [b, b], "found 1 and 2"),
        ([a, a[:1]], [b, b], r"lora_a\[1\] has .*lora_a\[0\] has"),
        ([a], [b.half()], r"lora_b\[0\] has"),
        ([a.transpose(1, 2)], [b], r"lora_a\[0\] needs contiguous rows"),
        ([a], [torch.zeros(2, 6, 8)[:, ::2, ::2]], r"lora_b\[0\] needs contiguous rows or columns"),
        ([a[0]], [b], r"lora_a\[0\] must be \[slots, rows, columns\]"),
    ):
        with pytest.raises(ValueError, match=words):
            SlotTable(lora_a, lora_b)


@pytest.mark.slow
def test_the_kernel_compiles_for_gpus_that_are_not_here():
    """In a process of its own: this one has Triton in interpreter mode."""
    program = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from multilora_kernels.triton.spread import scatter_kernel
for architecture in (80, 90, 100):
    for unit in ("i64", "i32", "i16"):
        signature = {"buffer": "*" + unit, "pieces": "*i64", "BLOCK": "constexpr"}
        compiled = triton.compile(
            ASTSource(scatter_kernel, signature, {(2,): 1024},
                      {(0,): [["tt.divisibility", 16]], (1,): [["tt.divisibility", 16]]}),
            target=GPUTarget("cuda", architecture, 32), options={"num_warps": 4})
        assert "ld.global" in compiled.asm["ptx"] and compiled.asm["cubin"]
        assert "st.local" not in compiled.asm["ptx"]
        print(architecture, unit)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9


@pytest.mark.skipif(DEVICE == "cuda", reason="copies are watched on the host")
def test_no_copy_crosses_the_end_of_a_part_that_was_registered_with_cuda(monkeypatch):
    """CUDA does not copy across memory that was registered in two parts."""
    monkeypatch.setattr(pieces, "REGISTERED_BYTES", 256)
    seen = []
    read = device_staging.host_bytes
    monkeypatch.setattr(
        device_staging, "host_bytes", lambda *where: seen.append(where) or read(*where)
    )
    model = make_model()
    plain = model.clone()
    index, matrices, buffer = make_adapter(model, dict.fromkeys(range(5), 7))
    model.table.scatter(1, index, backend="triton")
    assert buffer is not None
    assert matrices
    assert len(seen) > 20
    assert all(begin // 256 == (begin + size - 1) // 256 for begin, size in seen)
    plain.table.scatter(1, index, backend="torch")
    for mine, other in zip(
        (*model.lora_a, *model.lora_b), (*plain.lora_a, *plain.lora_b), strict=True
    ):
        assert mine.equal(other)
