"""Taking adapters in, against float64 arithmetic on the tensors that were written."""

import json
import threading
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vllm_multilora.adapters.adapter_errors import AdapterFormatError, AdapterReadError
from vllm_multilora.adapters.files import one_pass
from vllm_multilora.adapters.model.layout import (
    BLOCK_BYTES,
    LinearShape,
    ModelLayout,
    SliceLayout,
    SpecialShape,
)
from vllm_multilora.adapters.model.naming import ModuleNaming, Renames, Replacement
from vllm_multilora.adapters.model.tensor_names import parse_tensor_name
from vllm_multilora.failures import FailureKind, classify_failure

from ..checkpoints import MODULES, PREFIX, layout, weights, write
from ..packs import Pack, refused, take

ALL = {module: 4 for module, _, _ in MODULES}
Q0, V0, DOWN0, Q1, DOWN1 = (module for module, _, _ in MODULES)
EMBEDDING = {"model.embed_tokens": SpecialShape(99, 24, embedding=True)}
# Two roundings apart at most: of the product to float32, and to the slots' dtype.
TOLERANCE = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def assert_holds(pack: Pack, tensors, scalings: dict[str, float], rank: int = 0) -> None:
    """The pack holds exactly the slices of the modules with a scaling, and their values."""
    model, found = pack.layouts[rank], pack.contents(rank)
    tolerance = TOLERANCE[model.dtype.torch]
    expected_rows = []
    for part in sorted(model.slices, key=lambda part: part.row):
        if part.name not in scalings:
            continue
        expected_rows.append(part.row)
        a, b = (tensors[f"{PREFIX}{part.name}.lora_{x}.weight"].double() for x in "AB")
        first, last = part.rank_range or (0, len(a))
        a = a[first:last, slice(*part.input_range)]
        b = b[slice(*part.output_range)] * scalings[part.name]
        for got, expected in zip(found[part.row], (a, b), strict=True):
            assert got.shape == expected.shape
            assert torch.all((got.double() - expected).abs() <= tolerance * expected.abs()), part
    assert pack.index.ranks[rank].rows.tolist() == expected_rows


def half_of(model: ModelLayout, worker: int) -> ModelLayout:
    """What one of two workers has that share the outputs."""
    slices = (
        replace(part, output_range=(part.outputs // 2 * worker, part.outputs // 2 * (worker + 1)))
        for part in model.slices
    )
    return replace(model, slices=tuple(slices))


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("file_dtype", TOLERANCE, ids=str)
def test_every_dtype_into_every_other(tmp_path, backend, file_dtype, dtype, columns_first):
    tensors = weights(ALL, file_dtype)
    write(tmp_path, tensors, rank=4, alpha=6)
    model = layout(dtype, columns_first=columns_first)
    assert_holds(take(tmp_path, model), tensors, dict.fromkeys(ALL, 1.5))


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
    rank = 4 if "rank_pattern" in config else ranks[Q0]
    write(tmp_path, tensors, rank=rank, alpha=6, **config)
    model = layout(columns_first=columns_first)
    adapter = take(tmp_path, model)
    assert_holds(adapter, tensors, scalings)
    index = adapter.index.ranks[0]
    assert index.ranks.tolist() == [r for m, _, _ in MODULES if (r := ranks.get(m))]
    assert (index.a_ranks == index.ranks).all()


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_keeps_its_own_part(tmp_path, backend, worker, columns_first):
    """Column-parallel q, row-parallel down; the other half is neither kept nor shifted."""
    tensors = weights(ALL)
    write(tmp_path, tensors, rank=4, alpha=6)
    model = half_of(layout(torch.bfloat16, columns_first=columns_first), worker)
    slices = tuple(
        replace(part, input_range=(35 * worker, 35 * worker + 35), output_range=(0, part.outputs))
        if "down" in part.name
        else part
        for part in model.slices
    )
    assert_holds(take(tmp_path, replace(model, slices=slices)), tensors, dict.fromkeys(ALL, 1.5))


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
        adapter = take(tmp_path, model)
        assert adapter.index.ranks[0].a_ranks.tolist() == [a_rank]
        assert adapter.index.ranks[0].ranks.tolist() == [rank]
        assert_holds(adapter, tensors, {Q0: 6 / rank})


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
    assert_holds(take(tmp_path, model), tensors, {Q0: 1.5})


QV = "model.layers.0.self_attn.qv_proj"


def with_qv(model: ModelLayout) -> ModelLayout:
    """A base model whose own code has two modules as one."""
    return replace(model, merged={QV: (Q0, V0)})


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("worker", [None, 0, 1], ids=["whole", "first-half", "second-half"])
def test_a_merged_module_fills_the_parts_that_slots_have(tmp_path, backend, worker, columns_first):
    """Each has the same A, and rows of its own of B."""
    model = with_qv(layout(columns_first=columns_first))
    if worker is not None:
        model = half_of(model, worker)
    tensors = weights({Q0: 4, V0: 4, DOWN0: 4})
    a, b, of_v = (f"{PREFIX}{name}" for name in (f"{Q0}.lora_A", f"{Q0}.lora_B", f"{V0}.lora_"))
    tensors[f"{of_v}A.weight"] = tensors[f"{a}.weight"].clone()
    merged = {n: t for n, t in tensors.items() if DOWN0 in n}
    merged[f"{PREFIX}{QV}.lora_A.weight"] = tensors[f"{a}.weight"]
    merged[f"{PREFIX}{QV}.lora_B.weight"] = torch.cat(
        [tensors[f"{b}.weight"], tensors[f"{of_v}B.weight"]]
    )
    write(tmp_path, merged, rank=4, alpha=6)
    assert_holds(take(tmp_path, model), tensors, {Q0: 1.5, V0: 1.5, DOWN0: 1.5})


@pytest.mark.parametrize(
    ("shapes", "code"),
    [
        ({QV: (24, 40)}, "wrong-shape"),
        ({QV: (25, 52)}, "wrong-shape"),
        ({QV: (24, 52), V0: (24, 12)}, "duplicate-tensor"),
    ],
    ids=["rows-of-one-part", "too-wide", "a-part-as-well"],
)
def test_a_merged_module_has_the_sizes_of_its_parts_and_stands_alone(tmp_path, shapes, code):
    tensors = {}
    for module, (inputs, outputs) in shapes.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(4, inputs)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(outputs, 4)
    write(tmp_path, tensors, rank=4, alpha=6)
    assert [problem.code for problem in refused(tmp_path, with_qv(layout()))] == [code]


def test_the_product_is_rounded_once(tmp_path, backend):
    """Values whose product is exact in float32 and rounds differently if B is rounded first."""
    b = torch.arange(1, 161, dtype=torch.float32).reshape(40, 4) / 1024 + 1
    a = torch.ones(4, 24)
    tensors = {f"{PREFIX}{Q0}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))}
    write(tmp_path, tensors, rank=4, alpha=4.3125)
    model = layout(torch.bfloat16)
    found = take(tmp_path, model).contents()[0][1]
    expected = (b.double() * (4.3125 / 4)).to(torch.bfloat16)
    assert torch.equal(found, expected)
    assert not torch.equal((b.bfloat16() * (4.3125 / 4)), expected)


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
    pack = take(tmp_path, model)
    exact = sum(tensor.numel() * 2 for tensor in tensors.values())
    assert exact <= pack.nbytes < 1.01 * exact
    assert pack.nbytes * 8 == model.largest_bytes()
    assert (pack.block_bytes % BLOCK_BYTES == 0).all()
    index = len(pack.index.encode())
    assert pack.taken.nbytes == exact + index
    assert index <= pack.block_bytes[-1] < index + BLOCK_BYTES


def test_large_tensors_are_cut_into_spans_and_come_together_again(tmp_path, backend):
    """Several megabytes; one with rows that are longer than a span."""
    name, wide = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    sizes = {name: (1024, 30_000), wide: (300_000, 8)}
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": torch.randn(shape, generator=generator)
        for module, (inputs, outputs) in sizes.items()
        for letter, shape in (("A", (24, inputs)), ("B", (outputs, 24)))
    }
    write(tmp_path, tensors, rank=24, alpha=30)
    slices = tuple(
        SliceLayout(module, row, inputs, outputs, (0, inputs), (0, outputs))
        for row, (module, (inputs, outputs)) in enumerate(sizes.items())
    )
    for columns_first in (False, True):
        model = layout(torch.bfloat16, slices=slices, max_rank=32, columns_first=columns_first)
        assert_holds(take(tmp_path, model), tensors, dict.fromkeys(sizes, 30 / 24))


@pytest.mark.parametrize("span_bytes", [1, 100, 333, 1000, 5000])
@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
def test_where_spans_end_changes_nothing(tmp_path, monkeypatch, columns_first, span_bytes):
    """Rows longer than a span, spans of many tensors, spans that end inside a raw tensor."""
    monkeypatch.setattr(one_pass, "SPAN_BYTES", span_bytes)
    tensors = weights(ALL, torch.bfloat16)
    shapes = {"A": (4, 9), "B": (9, 4)}
    raw = {f"lm_head.lora_{part}.weight": torch.rand(shape) for part, shape in shapes.items()}
    write(tmp_path, tensors | raw, rank=4, alpha=6)
    model = layout(torch.float16, columns_first=columns_first, special=frozenset({"lm_head"}))
    pack = take(tmp_path, model, half_of(model, 1))
    for rank in (0, 1):
        assert_holds(pack, tensors, dict.fromkeys(ALL, 1.5), rank)
    for name, tensor in raw.items():
        assert torch.equal(pack.raw(name), tensor)
    monkeypatch.undo()
    assert take(tmp_path, model).taken.digest == pack.taken.digest


def test_a_file_that_no_thread_can_hash_now_is_a_later_trys(tmp_path, monkeypatch):
    """As where a container may have no more processes."""

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(one_pass, "SPAN_BYTES", 1000)  # several spans: they are hashed on a thread
    tensors = weights(ALL)
    write(tmp_path, tensors, rank=4, alpha=6)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(AdapterReadError, match="can't start new thread") as refused:
            take(tmp_path, layout())
    assert classify_failure(refused.value) is FailureKind.UNREADABLE
    assert_holds(take(tmp_path, layout()), tensors, dict.fromkeys(ALL, 1.5))


def test_modules_are_renamed_and_patterns_see_the_old_name(tmp_path):
    tensors = weights({Q0: 4})
    old = {n.replace("model.layers", "language.layers"): t for n, t in tensors.items()}
    old["base_model.model.mtp.q_proj.lora_A.weight"] = torch.zeros(4, 3)
    write(tmp_path, old, rank=4, alpha=6, alpha_pattern={"language.layers.0.*": 8, "model.*": 1})
    prefixes = (Replacement("language.", "model."),)
    model = layout(naming=ModuleNaming(renames=Renames(prefixes=prefixes), skipped=("mtp.",)))
    assert_holds(take(tmp_path, model), tensors, {Q0: 2.0})


def test_what_vllm_serves_itself_is_kept_as_it_is(tmp_path, backend):
    tensors = weights({Q0: 4})
    raw = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.rand(4, 99).half(),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.rand(24, 4).half(),
        "base_model.model.lm_head.lora_A.weight": torch.rand(4, 24).bfloat16(),
        "base_model.model.lm_head.lora_B.weight": torch.rand(99, 4).bfloat16(),
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight": torch.rand(4, 9),
        "base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_B.weight": torch.rand(9, 4),
        "base_model.model.score.weight": torch.rand(2, 24),
    }
    base = {"base_model.model.model.embed_tokens.base_layer.weight": torch.rand(99, 24)}
    write(tmp_path, tensors | raw | base, rank=4, alpha=6, modules_to_save=["score"], secret="x")
    expert = "model.layers.0.mlp.experts.3.up_proj"
    special = {"model.embed_tokens", "lm_head", "model.layers.0.mlp.experts", expert, "score"}
    model = layout(special=frozenset(special), special_shapes=EMBEDDING)
    pack = take(tmp_path, model, model)
    assert_holds(pack, tensors, {Q0: 1.5})
    assert_holds(pack, tensors, {Q0: 1.5}, rank=1)
    assert pack.index.tensors.keys() == raw.keys()
    for name, tensor in raw.items():
        assert pack.index.tensors[name].dtype.torch == tensor.dtype
        assert torch.equal(pack.raw(name), tensor)
    # Once for all ranks, beside A and B of each, and the index.
    assert len(pack.block_bytes) == len(raw) + 2 * 2 + 1
    config = json.loads(pack.index.config)
    assert (config["r"], config["modules_to_save"]) == (4, ["score"])
    assert "secret" not in config


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_ranks_and_scalings_of_what_vllm_fills_are_pefts(tmp_path, rslora):
    base = torch.nn.ModuleDict({"model": torch.nn.ModuleDict(), "lm_head": torch.nn.Linear(24, 99)})
    base["model"]["embed_tokens"] = torch.nn.Embedding(99, 24)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["embed_tokens", "lm_head"],
        use_rslora=rslora,
        rank_pattern={"embed_tokens": 8},
        alpha_pattern={"lm_head": 32, "model.embed_.*": 20},
    )
    peft = get_peft_model(base, config)
    peft.save_pretrained(tmp_path, save_embedding_layers=False)
    model = layout(special=frozenset({*EMBEDDING, "lm_head"}), special_shapes=EMBEDDING)
    pack = take(tmp_path, model)
    assert len(pack.index.tensors) == 4
    for name, raw in pack.index.tensors.items():
        module = peft.base_model.model.get_submodule(parse_tensor_name(name).module)
        assert (raw.rank, raw.scaling) == (module.r["default"], module.scaling["default"])


@pytest.mark.parametrize("adapted", [0, 1], ids=["outer", "down_proj"])
@pytest.mark.parametrize("outer", ["gate_up_proj", "up_proj"])
def test_experts_with_one_of_their_parameters_adapted_are_refused(tmp_path, outer, adapted):
    """PEFT calls the tensors of either the same, and vLLM fails on what it needs of the other."""
    experts = torch.nn.Module()
    width = 40 if outer == "gate_up_proj" else 20
    setattr(experts, outer, torch.nn.Parameter(torch.zeros(2, width, 24)))
    experts.down_proj = torch.nn.Parameter(torch.zeros(2, 24, 20))
    base = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"experts": experts})})
    shapes = {"model.experts.base_layer": LinearShape(24, width, 2, gated=width == 40)}
    model = layout(special=frozenset({"model.experts"}), linear_shapes=shapes)
    parameters = [outer, "down_proj"]
    for number, names in enumerate((parameters[adapted:][:1], parameters)):
        config = LoraConfig(
            r=4, target_modules=[], target_parameters=[f"experts.{name}" for name in names]
        )
        folder = tmp_path / str(number)
        get_peft_model(deepcopy(base), config).save_pretrained(folder)
    assert len(take(tmp_path / "1", model).index.tensors) == 4
    (problem,) = refused(tmp_path / "0", model)
    assert (problem.code, problem.count) == ("half-missing", 1)
    assert problem.where == "base_model.model.model.experts.lora_A.weight"
    assert f"'{outer}' and 'down_proj'" in problem.message


def test_experts_held_as_one_and_one_by_one_are_refused(tmp_path):
    tensors = {
        f"{PREFIX}model.experts{module}.lora_{part}.weight": torch.ones(8, 8)
        for module in ("", ".base_layer", ".0.w1")
        for part in "AB"
    }
    write(tmp_path, tensors, 8, 8, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    special = frozenset({"model.experts", "model.experts.0.w1"})
    (problem,) = refused(tmp_path, layout(special=special))
    assert (problem.code, problem.where) == (
        "duplicate-tensor",
        f"{PREFIX}model.experts.0.w1.lora_A.weight",
    )


def test_two_modules_that_become_one_are_refused(tmp_path):
    write(tmp_path, weights({Q0: 4, Q1: 4}), rank=4, alpha=6)
    substrings = (Replacement("layers.1", "layers.0"),)
    model = layout(naming=ModuleNaming(renames=Renames(substrings=substrings)))
    with pytest.raises(AdapterFormatError, match=Q1.replace(".", r"\.")):
        take(tmp_path, model)


def test_ranges_outside_a_tensor_are_refused():
    with pytest.raises(ValueError, match=r"q: output_range \(0, 9\) is not a part of \[0, 8\)"):
        SliceLayout("q", 0, 4, 8, (0, 4), (0, 9))


def test_some_experts_take_only_their_own_bytes(tmp_path):
    name = "model.layers.0.mlp.experts.{}.w1"
    shapes = {name.format(expert): LinearShape(64, 96) for expert in range(32)}
    model = layout(torch.bfloat16, special=frozenset(shapes), linear_shapes=shapes, max_rank=64)
    sizes = []
    for experts in ([3], range(32)):
        tensors = {
            f"{PREFIX}{name.format(e)}.lora_{x}.weight": torch.ones(shape).bfloat16()
            for e in experts
            for x, shape in (("A", (8, 64)), ("B", (96, 8)))
        }
        write(tmp_path / str(len(experts)), tensors, rank=8, alpha=8)
        pack = take(tmp_path / str(len(experts)), model)
        exact = sum(tensor.nbytes for tensor in tensors.values())
        sizes.append(pack.nbytes)
        assert exact <= sizes[-1] < 1.1 * exact
    assert sizes[0] == sizes[1] / 32
