"""Blends taken in, against float64 arithmetic: what PEFT's `cat` makes of the same parts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_multilora.adapters.adapter_errors import AdapterFormatError, AdapterNotFoundError
from vllm_multilora.adapters.blend import Blend, BlendPart
from vllm_multilora.adapters.blend_intake import open_blend
from vllm_multilora.adapters.intake import Rules, open_adapter
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout
from vllm_multilora.adapters.problems import Problem

from ..checkpoints import MODULES, PREFIX, layout, weights, write
from ..packs import Pack, taken

ALL = [module for module, _, _ in MODULES]
Q0, V0, DOWN0, Q1, DOWN1 = ALL
# Parts of ranks that no vector has, some modules in one part only, patterns and rsLoRA.
PARTS = {
    "small": (dict.fromkeys(ALL, 3), 3, {"lora_alpha": 6}),
    "some": ({Q0: 5, DOWN1: 5}, 5, {"lora_alpha": 20, "use_rslora": True}),
    "patterns": (
        {Q0: 7, V0: 1, DOWN0: 2},
        2,
        {
            "lora_alpha": 4,
            "rank_pattern": {"q_proj": 7, "v_proj": 1},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
}
WEIGHTS = {"small": 0.7, "some": -0.5, "patterns": 1.25}
SCALES = {
    "small": dict.fromkeys(ALL, 2.0),
    "some": dict.fromkeys((Q0, DOWN1), 20 / 5**0.5),
    "patterns": {Q0: 4 / 7, V0: 4.0, DOWN0: 1.5},
}
TOLERANCE = {torch.float32: 2**-22, torch.bfloat16: 2**-8}


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for seed, (name, (ranks, rank, config)) in enumerate(PARTS.items()):
        found[name] = weights(ranks, seed=seed)
        options = dict(config)
        write(tmp_path / name, found[name], rank, options.pop("lora_alpha"), **options)
    return found


def blend_of(folder: Path, **weights: float) -> Blend:
    return Blend.of(
        BlendPart(number, name, str(folder / name), weight)
        for number, (name, weight) in enumerate(weights.items(), 1)
    )


def take(folder: Path, *layouts, rules: Rules | None = None, **weights: float) -> Pack:
    with open_blend(blend_of(folder, **weights), rules or Rules()) as source:
        return taken(source.check(layouts), *layouts)


def refused(folder: Path, model: ModelLayout, **weights: float) -> list[Problem]:
    """Why a blend is not taken in: of all parts, unless others are named."""
    with pytest.raises(AdapterFormatError) as caught:
        take(folder, model, **(weights or WEIGHTS))
    return list(caught.value.problems)


def side_by_side(tensors, module: str, weights) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A and B of a module in float64, scales and weights in B."""
    a, b = [], []
    for name in sorted(weights):
        if f"{PREFIX}{module}.lora_A.weight" in tensors[name]:
            scale = SCALES[name][module] * weights[name]
            a.append(tensors[name][f"{PREFIX}{module}.lora_A.weight"].double())
            b.append(tensors[name][f"{PREFIX}{module}.lora_B.weight"].double() * scale)
    return (torch.cat(a), torch.cat(b, 1)) if a else None


def assert_holds(pack: Pack, tensors, weights, rank: int = 0) -> None:
    model, found = pack.layouts[rank], pack.contents(rank)
    tolerance = TOLERANCE[model.dtype.torch]
    rows = []
    for part in sorted(model.slices, key=lambda part: part.row):
        both = side_by_side(tensors, part.name, weights)
        if both is None:
            continue
        rows.append(part.row)
        a, b = both
        first, last = part.rows_of_a(len(a))
        factors = a[first:last, slice(*part.input_range)], b[slice(*part.output_range)]
        for got, product in zip(found[part.row], factors, strict=True):
            assert got.shape == product.shape
            assert torch.all((got.double() - product).abs() <= tolerance * product.abs()), part
    assert pack.index.ranks[rank].rows.tolist() == rows


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ranks_stand_side_by_side_with_scales_and_weights_in_b(
    tmp_path, tensors, backend, dtype, columns_first
):
    model = layout(dtype, columns_first=columns_first)
    pack = take(tmp_path, model, **WEIGHTS)
    assert_holds(pack, tensors, WEIGHTS)
    assert pack.rank == 3 + 5 + 7  # of q_proj in the first layer


@pytest.mark.parametrize("columns_first", [False, True], ids=["by-row", "by-column"])
def test_every_worker_gets_its_part_of_the_sum(tmp_path, tensors, backend, columns_first):
    """Two ranks of plain sharding, and three that share the rank."""
    whole = layout(columns_first=columns_first)

    def shard(part: SliceLayout, at: int) -> SliceLayout:
        inputs, outputs = part.inputs // 2, part.outputs // 2
        return replace(
            part,
            input_range=(at * inputs, (at + 1) * inputs),
            output_range=(at * outputs, (at + 1) * outputs),
        )

    halves = [replace(whole, slices=tuple(shard(s, at) for s in whole.slices)) for at in (0, 1)]
    thirds = [
        replace(
            whole,
            slices=tuple(replace(s, rank_range=(6 * at, 6 * at + 6)) for s in whole.slices),
            max_rank=18,
        )
        for at in (0, 1, 2)
    ]
    for layouts in (halves, thirds):
        pack = take(tmp_path, *layouts, **WEIGHTS)
        for rank in range(len(layouts)):
            assert_holds(pack, tensors, WEIGHTS, rank)


def test_one_part_is_an_adapter_with_another_strength(tmp_path, tensors):
    assert_holds(take(tmp_path, layout(), small=0.25), tensors, {"small": 0.25})


def test_the_digest_says_which_weights_and_what_of_them(tmp_path, tensors):
    pack = take(tmp_path, layout(), **WEIGHTS)
    digests = []
    for name in sorted(WEIGHTS):
        with open_adapter(str(tmp_path / name), Rules()) as source:
            digests.append(source.digest())
    assert pack.taken.parts == tuple(digests)
    assert pack.taken.digest == blend_of(tmp_path, **WEIGHTS).digest(digests)
    reordered = dict(reversed(WEIGHTS.items()))
    assert take(tmp_path, layout(), **reordered).taken == pack.taken


def test_a_part_that_changes_changes_the_version(tmp_path, tensors):
    def version() -> str:
        with open_blend(blend_of(tmp_path, **WEIGHTS), Rules()) as source:
            return source.version

    before = version()
    assert before.startswith("blend-")  # no other adapter's does
    assert version() == before
    write(tmp_path / "some", weights({Q0: 5}, seed=9), 5, 5)
    assert version() != before


def test_a_blend_has_no_version_where_a_part_has_none(tmp_path, tensors):
    """Else what its files were refused for would be remembered of those that come."""
    (tmp_path / "some" / "adapter_config.json").unlink()
    with open_blend(blend_of(tmp_path, **WEIGHTS), Rules()) as source:
        assert source.version == "-"


def test_ranks_that_add_up_to_too_much_are_named(tmp_path, tensors):
    (problem,) = refused(tmp_path, layout(max_rank=14))
    assert problem.code == "rank-too-large"
    assert problem.message == (
        "blend 1.25*patterns+0.7*small+-0.5*some: its rank is 7 (patterns) + 3 (small) + 5 (some) "
        f"= 15 in {Q0}, expected at most 14"
    )
    take(tmp_path, layout(max_rank=15), **WEIGHTS)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
        ({"use_dora": True}, "use_dora"),
    ],
    ids=["activated", "dora"],
)
def test_parts_that_are_no_sum_are_refused_by_name(tmp_path, tensors, config, key):
    file = tmp_path / "some" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    (problem,) = refused(tmp_path, layout())
    assert problem.where == key
    assert str(file) in problem.message


def test_a_dora_part_is_refused_for_the_same_reason_whatever_the_flags(tmp_path, tensors):
    """The flag that a DoRA adapter needs on its own would not help it into a blend."""
    b = {module: tensors["some"][f"{PREFIX}{module}.lora_B.weight"] for module in (Q0, DOWN1)}
    magnitudes = {
        f"{PREFIX}{module}.lora_magnitude_vector": torch.ones(len(rows))
        for module, rows in b.items()
    }
    write(tmp_path / "some", tensors["some"] | magnitudes, 5, 20, use_dora=True)
    first, second = (refused(tmp_path, replace(layout(), dora=dora)) for dora in (False, True))
    assert first == second
    assert "unset in a part of a blend" in str(first[0])


def test_what_is_wrong_with_all_parts_is_said_at_once(tmp_path, tensors):
    for name, text in (("some", "{}"), ("small", "[]")):
        (tmp_path / name / "adapter_config.json").write_text(text)
    files = {Path(problem.file).parent.name for problem in refused(tmp_path, layout())}
    assert files == {"some", "small"}


def test_a_part_that_is_not_there_or_not_allowed_is_no_part(tmp_path, tensors):
    with pytest.raises(AdapterNotFoundError):
        take(tmp_path, layout(), small=1.0, nobody=1.0)
    allowed = tmp_path / "allowed"
    shutil.copytree(tmp_path / "small", allowed / "small")
    (allowed / "some").symlink_to(tmp_path / "some")
    rules = Rules(allowed_roots=(str(allowed),))
    take(allowed, layout(), rules=rules, small=1.0)
    with pytest.raises(AdapterFormatError, match="some is outside the folders"):
        take(allowed, layout(), rules=rules, small=1.0, some=1.0)


@pytest.mark.parametrize("kept", [1, 2], ids=["kept", "not-kept"])
def test_a_weight_that_makes_values_overflow_is_refused(tmp_path, kept):
    """A sound adapter with too large a weight: 70,000 is infinite in float16, on any worker."""
    tensors = weights({Q0: 2})
    tensors[f"{PREFIX}{Q0}.lora_B.weight"][-1, 1] = 700.0
    write(tmp_path / "loud", tensors, 2, 2)
    model = layout(torch.float16)
    slices = (replace(part, output_range=(0, part.outputs // kept)) for part in model.slices)
    model = replace(model, slices=tuple(slices))
    take(tmp_path, model, loud=1.0)
    assert {problem.code for problem in refused(tmp_path, model, loud=100.0)} == {"overflow"}
