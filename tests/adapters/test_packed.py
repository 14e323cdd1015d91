"""Packing, against float64 arithmetic on the tensors that were written."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from multilora_kernels.native import is_available
from vllm_multilora.adapters import (
    AdapterCheckpoint,
    AdapterFormatError,
    AdapterReadError,
    ModelLayout,
    PackedAdapter,
    SliceLayout,
    pack,
)
from vllm_multilora.adapters.layout import BLOCK_BYTES

from .checkpoints import MODULES, PREFIX, layout, weights, write

ALL = {module: 4 for module, _, _ in MODULES}
Q0, V0, DOWN0, Q1, DOWN1 = (module for module, _, _ in MODULES)
# Two roundings apart at most: of the product to float32, and to the slots' dtype.
TOLERANCE = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=["native", "torch"])
def backend(request):
    assert request.param == "torch" or is_available()
    return request.param


def packed(folder, model: ModelLayout, **options) -> PackedAdapter:
    with AdapterCheckpoint.open(folder) as checkpoint:
        return pack(checkpoint, model, **options)


def contents(adapter: PackedAdapter, model: ModelLayout) -> dict[int, tuple]:
    """A [a_rank, K] and B [N, rank] of each row."""
    parts = {part.row: part for part in model.slices}
    found = {}
    for row, rank, a_rank, a_at, b_at in zip(
        adapter.rows,
        adapter.ranks,
        adapter.a_ranks,
        adapter.a_offsets,
        adapter.b_offsets,
        strict=True,
    ):
        part = parts[int(row)]
        inputs = part.input_range[1] - part.input_range[0]
        outputs = part.output_range[1] - part.output_range[0]
        a = adapter.buffer[a_at : a_at + a_rank * inputs].view(a_rank, inputs)
        b = adapter.buffer[b_at : b_at + rank * outputs]
        b = b.view(rank, outputs).T if model.columns_first else b.view(outputs, rank)
        found[int(row)] = (a, b)
    return found


def assert_holds(adapter, model, tensors, scalings: dict[str, float]) -> None:
    """The adapter holds exactly the slices of the modules with a scaling, and their values."""
    found = contents(adapter, model)
    tolerance = TOLERANCE[model.dtype]
    expected_rows = []
    for part in sorted(model.slices, key=lambda part: part.row):
        if part.name not in scalings:
            continue
        expected_rows.append(part.row)
        a, b = (tensors[f"{PREFIX}{part.name}.lora_{x}.weight"].double() for x in "AB")
        first, last = part.rank_range or (0, len(a))
        a = a[first:last, slice(*part.input_range)]
        b = b[slice(*part.output_range)] * scalings[part.name]
        for got, want in zip(found[part.row], (a, b), strict=True):
            assert got.shape == want.shape
            assert torch.all((got.double() - want).abs() <= tolerance * want.abs()), part
    assert adapter.rows.tolist() == expected_rows


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("file_dtype", TOLERANCE, ids=str)
def test_every_dtype_into_every_other(tmp_path, backend, file_dtype, dtype, columns_first):
    tensors = weights(ALL, file_dtype)
    write(tmp_path, tensors, rank=4, alpha=6)
    model = layout(dtype, columns_first=columns_first)
    adapter = packed(tmp_path, model, backend=backend)
    assert adapter.buffer.dtype == dtype
    assert_holds(adapter, model, tensors, dict.fromkeys(ALL, 1.5))


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize(
    ("ranks", "config", "scalings"),
    [
        pytest.param(dict.fromkeys(ALL, 5), {}, dict.fromkeys(ALL, 6 / 5), id="odd-rank"),
        pytest.param(dict.fromkeys(ALL, 1), {}, dict.fromkeys(ALL, 6.0), id="rank-1"),
        pytest.param({Q0: 4, DOWN1: 4}, {}, {Q0: 1.5, DOWN1: 1.5}, id="missing-slices"),
        pytest.param(
            {Q0: 8, Q1: 2, V0: 4},
            {"rank_pattern": {"layers.0.self_attn.q_proj": 8, "q_proj": 2}},
            {Q0: 6 / 8, Q1: 6 / 2, V0: 6 / 4},
            id="rank-pattern",
        ),
        pytest.param(
            ALL,
            {"alpha_pattern": {"down_proj": 12, "^model.layers.0.*": 2}},
            {Q0: 0.5, V0: 0.5, DOWN0: 3.0, Q1: 1.5, DOWN1: 3.0},
            id="alpha-pattern",
        ),
        pytest.param(
            {Q0: 9, V0: 4},
            {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"v_proj": 3}},
            {Q0: 6 / 3, V0: 3 / 2},
            id="rslora",
        ),
        pytest.param(ALL, {"lora_alpha": 4}, dict.fromkeys(ALL, 1.0), id="scaling-1"),
    ],
)
def test_ranks_and_scalings_of_every_kind(
    tmp_path, backend, ranks, config, scalings, columns_first
):
    tensors = weights(ranks)
    rank = next(r for m, r in ranks.items() if m not in (Q0, Q1)) if len(ranks) > 2 else ranks[Q0]
    if "rank_pattern" in config:
        rank = 4
    write(tmp_path, tensors, rank=rank, alpha=6, **config)
    model = layout(columns_first=columns_first)
    adapter = packed(tmp_path, model, backend=backend)
    assert_holds(adapter, model, tensors, scalings)
    assert adapter.ranks.tolist() == [r for m, _, _ in MODULES if (r := ranks.get(m))]
    assert (adapter.a_ranks == adapter.ranks).all()


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_keeps_its_own_part(tmp_path, backend, worker, columns_first):
    """Column-parallel q, row-parallel down; the other half is neither kept nor shifted."""
    tensors = weights(ALL)
    write(tmp_path, tensors, rank=4, alpha=6)
    whole = layout(torch.bfloat16, columns_first=columns_first)
    slices = tuple(
        replace(part, input_range=(35 * worker, 35 * worker + 35))
        if "down" in part.name
        else replace(
            part, output_range=(part.outputs // 2 * worker, part.outputs // 2 * (worker + 1))
        )
        for part in whole.slices
    )
    model = replace(whole, slices=slices)
    adapter = packed(tmp_path, model, backend=backend)
    assert_holds(adapter, model, tensors, dict.fromkeys(ALL, 1.5))


@pytest.mark.parametrize(
    ("rank", "held"), [(16, (4, 4)), (6, (4, 2)), (4, (4, 0)), (3, (3, 0))], ids=str
)
def test_a_sharded_rank_is_held_in_part(tmp_path, backend, rank, held):
    tensors = weights({Q0: rank})
    write(tmp_path, tensors, rank=rank, alpha=6)
    for worker, a_rank in enumerate(held):
        shard = (4 * worker, 4 * worker + 4)
        part = replace(layout().slices[0], rank_range=shard)
        model = layout(slices=(part,))
        adapter = packed(tmp_path, model, backend=backend)
        assert adapter.a_ranks.tolist() == [a_rank]
        assert adapter.ranks.tolist() == [rank]
        assert_holds(adapter, model, tensors, {Q0: 6 / rank})


def test_slices_of_one_name_are_cut_from_the_same_tensors(tmp_path, backend):
    """A fused projection that the base model computes as several slices."""
    tensors = weights({Q0: 4})
    write(tmp_path, tensors, rank=4, alpha=6)
    model = layout(
        slices=tuple(
            SliceLayout(Q0, row, 24, 40, (0, 24), rows)
            for row, rows in ((2, (0, 16)), (0, (16, 28)), (7, (28, 40)))
        )
    )
    assert_holds(packed(tmp_path, model, backend=backend), model, tensors, {Q0: 1.5})


def test_the_product_is_rounded_once(tmp_path, backend):
    """Values whose product is exact in float32 and rounds differently if B is rounded first."""
    b = torch.arange(1, 161, dtype=torch.float32).reshape(40, 4) / 1024 + 1
    a = torch.ones(4, 24)
    tensors = {f"{PREFIX}{Q0}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
    write(tmp_path, tensors, rank=4, alpha=4.3125)
    model = layout(torch.bfloat16)
    found = contents(packed(tmp_path, model, backend=backend), model)[0][1]
    expected = (b.double() * (4.3125 / 4)).to(torch.bfloat16)
    assert torch.equal(found, expected)
    assert not torch.equal((b.bfloat16() * (4.3125 / 4)), expected)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_change_nothing(tmp_path, threads):
    tensors = weights(ALL)
    write(tmp_path, tensors, rank=4, alpha=6)
    model = layout(torch.float16, columns_first=True)
    adapter = packed(tmp_path, model, threads=threads)
    assert_holds(adapter, model, tensors, dict.fromkeys(ALL, 1.5))


def big_layout(**options) -> ModelLayout:
    names = [(f"model.layers.{i}.mlp.up_proj", 1024, 3000) for i in range(3)]
    slices = tuple(
        SliceLayout(name, i, k, n, (0, k), (0, n)) for i, (name, k, n) in enumerate(names)
    )
    return layout(torch.bfloat16, slices=slices, **options)


def big_tensors(rank: int) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{part.name}.lora_{letter}.weight": torch.rand(shape)
        for part in big_layout().slices
        for letter, shape in (("A", (rank, part.inputs)), ("B", (part.outputs, rank)))
    }


def test_bytes_follow_the_true_rank(tmp_path):
    tensors = big_tensors(rank=8)
    write(tmp_path, tensors, rank=8, alpha=8)
    model = big_layout(max_rank=64)
    adapter = packed(tmp_path, model)
    exact = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert exact <= adapter.nbytes < 1.01 * exact
    assert adapter.nbytes == adapter.buffer.untyped_storage().nbytes()
    assert adapter.nbytes * 8 == model.largest_bytes()


def test_the_largest_adapter_has_the_announced_size(tmp_path):
    write(tmp_path, weights(dict.fromkeys(ALL, 16)), rank=16, alpha=8)
    for columns_first in (False, True):
        model = layout(torch.bfloat16, columns_first=columns_first)
        assert packed(tmp_path, model).nbytes == model.largest_bytes()


def test_blocks_are_aligned_and_do_not_overlap(tmp_path):
    write(tmp_path, weights(dict.fromkeys(ALL, 5)), rank=5, alpha=8)
    model = layout(torch.bfloat16)
    adapter = packed(tmp_path, model)
    begins = np.concatenate([adapter.a_offsets, adapter.b_offsets])
    assert (begins * 2 % BLOCK_BYTES == 0).all()
    sizes = [t.numel() for pair in contents(adapter, model).values() for t in pair]
    at = np.argsort(np.stack([adapter.a_offsets, adapter.b_offsets], 1).reshape(-1))
    ends = np.sort(begins) + np.array(sizes)[at]
    assert (ends[:-1] <= np.sort(begins)[1:]).all()
    assert ends[-1] <= adapter.buffer.numel()


def test_modules_are_renamed_and_patterns_see_the_old_name(tmp_path):
    tensors = weights({Q0: 4})
    old = {n.replace("model.layers", "language.layers"): t for n, t in tensors.items()}
    old["base_model.model.mtp.q_proj.lora_A.weight"] = torch.zeros(4, 3)
    write(tmp_path, old, rank=4, alpha=6, alpha_pattern={"language.layers.0.*": 8, "model.*": 1})

    def rename(module: str) -> str | None:
        return None if module.startswith("mtp.") else module.replace("language.", "model.")

    model = layout(rename=rename)
    assert_holds(packed(tmp_path, model), model, tensors, {Q0: 2.0})


def test_what_vllm_serves_itself_is_passed_over(tmp_path):
    tensors = weights({Q0: 4})
    others = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 99),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.zeros(24, 4),
        "base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(99, 24),
        "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 24),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(99, 4),
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight": torch.zeros(4, 9),
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight": torch.zeros(9, 4),
        "base_model.model.score.weight": torch.zeros(2, 24),
    }
    write(tmp_path, tensors | others, rank=4, alpha=6, modules_to_save=["score"])
    special = {"model.embed_tokens", "lm_head", "model.layers.0.mlp.experts", "score"}
    model = layout(special=frozenset(special))
    assert_holds(packed(tmp_path, model), model, tensors, {Q0: 1.5})


def test_an_adapter_with_nothing_to_pack_is_an_empty_buffer(tmp_path, backend):
    head = {"lm_head.lora_A.weight": torch.zeros(4, 9), "lm_head.lora_B.weight": torch.zeros(9, 4)}
    write(tmp_path, head, rank=4, alpha=6)
    adapter = packed(tmp_path, layout(special=frozenset({"lm_head"})), backend=backend)
    assert adapter.nbytes == 0
    assert len(adapter.rows) == 0


A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
GOOD = weights({Q0: 4})


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        ({B: None}, {}, (A, "lora_B")),
        ({A: None}, {}, (B, "lora_A")),
        ({A: torch.zeros(4, 25)}, {}, (A, "25", "24")),
        ({B: torch.zeros(39, 4)}, {}, (B, "39", "40")),
        ({B: torch.zeros(40, 3)}, {}, (B, "3", "4")),
        ({A: torch.zeros(96)}, {}, (A, "[96]")),
        ({A: torch.zeros(24, 4)}, {}, (A, "24", "4")),
        ({}, {"r": 8}, (A, "rank", "4", "8", "adapter_config.json")),
        ({A: torch.zeros(4, 24).double()}, {}, (A, "float64")),
        (
            {A: torch.zeros(17, 24), B: torch.zeros(40, 17)},
            {"r": 17},
            ("17", "16", "max-lora-rank"),
        ),
        (
            {"model.layers.9.q_proj.lora_A.weight": torch.zeros(4, 4)},
            {},
            ("model.layers.9.q_proj",),
        ),
        ({f"{PREFIX}{Q0}.lora_embedding_A": torch.zeros(4, 24)}, {}, ("lora_embedding_A",)),
        ({f"{PREFIX}{Q0}.lora_B.bias": torch.zeros(40)}, {}, ("lora_B.bias",)),
        ({f"{PREFIX}lm_head.weight": torch.zeros(9, 24)}, {}, ("lm_head.weight",)),
        ({f"{PREFIX}score.weight": torch.zeros(9, 24)}, {}, ("score.weight",)),
        ({f"{Q0}.lora_A.weight": torch.zeros(4, 24)}, {}, (f"{Q0}.lora_A.weight",)),
        ({}, {"use_dora": True}, ("use_dora", "DoRA")),
    ],
)
def test_what_does_not_fit_is_refused_with_its_name(tmp_path, changes, config, words):
    tensors = {n: t for n, t in (GOOD | changes).items() if t is not None}
    write(tmp_path, tensors, rank=4, alpha=6, **config)
    with pytest.raises(AdapterFormatError) as caught:
        packed(tmp_path, layout())
    for word in words:
        assert word in str(caught.value)


def test_two_modules_that_become_one_are_refused(tmp_path):
    write(tmp_path, weights({Q0: 4, Q1: 4}), rank=4, alpha=6)
    model = layout(rename=lambda module: module.replace("layers.1", "layers.0"))
    with pytest.raises(AdapterFormatError, match=Q1.replace(".", r"\.")):
        packed(tmp_path, model)


def test_a_file_truncated_after_opening_is_an_error(tmp_path, backend):
    write(tmp_path, weights(ALL), rank=4, alpha=6)
    with AdapterCheckpoint.open(tmp_path) as checkpoint:
        name = list(checkpoint.tensors)[-1]
        os.truncate(checkpoint.tensors_path, checkpoint.tensors[name].end - 1)
        with pytest.raises(AdapterReadError, match=rf"the file ends inside {name}"):
            pack(checkpoint, layout(), backend=backend)


def test_a_file_written_to_while_it_is_read_is_an_error(tmp_path, backend):
    write(tmp_path, weights(ALL), rank=4, alpha=6)
    with AdapterCheckpoint.open(tmp_path) as checkpoint:
        checkpoint.tensors_path.write_bytes(checkpoint.tensors_path.read_bytes())
        os.utime(checkpoint.tensors_path, ns=(0, checkpoint.fingerprint.mtime_ns + 1))
        with pytest.raises(AdapterReadError, match="written to while it was being read"):
            pack(checkpoint, layout(), backend=backend)


def test_ranges_outside_a_tensor_are_refused():
    with pytest.raises(ValueError, match=r"q: output_range \(0, 9\) is not a part of \[0, 8\)"):
        SliceLayout("q", 0, 4, 8, (0, 4), (0, 9))
