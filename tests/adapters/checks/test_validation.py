"""Validation: every bad adapter of the corpus has exactly its problems, no valid one has any."""

import errno
import itertools
import json
import os
import pickle
import time
from dataclasses import replace

import pytest
import torch

from multilora_kernels.dtypes import FLOAT16
from vllm_multilora.adapters.adapter_errors import AdapterError, AdapterFormatError
from vllm_multilora.adapters.intake import Rules
from vllm_multilora.adapters.model.layout import LinearShape
from vllm_multilora.adapters.model.naming import ModuleNaming
from vllm_multilora.adapters.model.size_limits import SizeLimits
from vllm_multilora.adapters.problems import Code
from vllm_multilora.adapters.validation import validate

from ..checkpoints import config_of
from ..corpus import BAD, BAD_DORA, DORA_LAYOUT, LAYOUT, VALID
from ..corpus.bad_dora import make_dora
from ..corpus.draft import V1, add_embedding, add_head, good, name_of
from ..corpus.headers import append_hole, rewrite
from ..corpus.llama_layout import MODULES
from ..packs import take

SEEN_IN_VALUES = {Code.NOT_FINITE, Code.OVERFLOW, Code.FILE_TOO_LARGE}


@pytest.mark.parametrize(
    ("case", "layout"),
    [(case, LAYOUT) for case in BAD.values()] + [(case, DORA_LAYOUT) for case in BAD_DORA.values()],
    ids=[*BAD, *BAD_DORA],
)
def test_a_bad_adapter_has_exactly_its_problems(case, layout, tmp_path):
    folder = case.write(tmp_path / "adapter")
    problems = validate(folder, layout)
    assert [problem.code for problem in problems] == list(case.codes)
    if case.is_right_untied:  # PEFT warns of the key, and adapts what is named
        assert validate(folder, replace(LAYOUT, tied=False)) == []
    first = problems[0]
    assert str(folder / case.file) in first.message
    assert all(word in str(first) for word in case.words), str(first)
    for problem in problems:
        assert problem.found
        assert problem.expected
        assert problem.where in problem.message
        assert json.loads(json.dumps(problem.as_dict()))["code"] == problem.code.value
    if not SEEN_IN_VALUES & set(case.codes):  # a load refuses it where nobody has asked before
        with pytest.raises(AdapterError) as caught:
            take(folder, layout, rules=Rules(check_finite=False))
        assert {problem.code for problem in caught.value.problems} <= set(case.codes)


@pytest.mark.parametrize("case", VALID.values(), ids=VALID)
def test_a_valid_adapter_has_no_problem_and_is_packed(case, tmp_path):
    folder = case.write(tmp_path / "adapter")
    assert validate(folder, LAYOUT) == []
    assert take(folder, LAYOUT).nbytes > 0


def test_the_corpus_is_large_and_covers_every_code():
    assert len(BAD) >= 60
    assert len(VALID) >= 20
    # Of these no folder can be an example: they are about limits, permissions, places, moments and
    # the server's settings; `test_signatures.py` has those of signatures, `test_required.py` the
    # wrong digest.
    elsewhere = {
        Code.FILE_UNREADABLE,
        Code.FILE_CHANGED,
        Code.TOO_MANY_TENSORS,
        Code.NOT_ALLOWED,
        Code.NOT_SIGNED,
        Code.WRONG_SIGNATURE,
        Code.NOT_AS_SIGNED,
        Code.WRONG_DIGEST,
        Code.NOTHING_APPLIED,
        Code.NOT_PICKLED_TENSORS,
        Code.MORE_PROBLEMS,
    }
    assert {code for case in BAD.values() for code in case.codes} | elsewhere == set(Code)


def test_overflow_is_judged_by_the_type_of_the_slots(tmp_path):
    draft = good()
    name = next(name for name in draft.tensors if ".lora_A." in name)
    draft.tensors[name][0, 0] = 1e5
    folder = draft.write(tmp_path / "adapter")
    half = replace(LAYOUT, dtype=FLOAT16)
    assert validate(folder, LAYOUT) == []
    [problem] = validate(folder, half)
    assert problem.code == Code.OVERFLOW
    assert problem.where == name
    assert "at most 65504" in problem.message


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (SizeLimits(config_bytes=10), Code.FILE_TOO_LARGE),
        (SizeLimits(header_bytes=10), Code.HEADER_TOO_LARGE),
        (SizeLimits(tensors=41), Code.TOO_MANY_TENSORS),
    ],
    ids=["config", "header", "tensors"],
)
def test_limits_are_the_callers(tmp_path, limits, code):
    folder = good().write(tmp_path / "adapter")
    assert [problem.code for problem in validate(folder, LAYOUT, limits=limits)] == [code]


def test_a_large_file_that_holds_nothing_is_refused_where_sizes_are_bounded_loosely(tmp_path):
    """60 GiB of holes in the place of an expert, which nobody could tell to be too large."""
    name, more = "base_model.model.model.layers.0.mlp.experts.lora_A.weight", 60 << 30
    experts = replace(LAYOUT, special=LAYOUT.special | {"model.layers.0.mlp.experts"})
    folder = good().write(tmp_path / "adapter")
    append_hole(folder, name, more)
    began = time.thread_time()
    [problem] = [p for p in validate(folder, experts) if p.code == Code.FILE_TOO_LARGE]
    assert "sparse" in problem.message
    assert time.thread_time() - began < 5


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = good().write(tmp_path / "adapter")
    monkeypatch.setattr("os.preadv", fail)
    problems = validate(folder, LAYOUT)
    assert [problem.code for problem in problems] == [Code.FILE_UNREADABLE] * 2
    assert all("Input/output error" in problem.message for problem in problems)


def test_names_that_are_long_or_cannot_be_encoded_are_shown_short_and_escaped(tmp_path):
    draft = good()
    rewrite(draft, lambda header: header | {"\ud800" + "x" * 10_000 + "\n": {"dtype": "Q"}})
    [problem] = validate(draft.write(tmp_path / "adapter"), LAYOUT)
    assert problem.code == Code.HEADER_ENTRY
    assert len(problem.message) < 1000
    assert problem.message.isprintable()


TARGETS = good().config["target_modules"]
EXPERTS = "model.layers.0.mlp.experts"
SIZE = (8, 8)


def pair(module, a=SIZE, b=SIZE):
    """Names and shapes of a module's tensors."""
    return {name_of(module, "A"): a, name_of(module, "B"): b}


def special(*modules, **options):
    """The layout of a base model with more modules that vLLM serves itself."""
    return replace(LAYOUT, special=LAYOUT.special | {*modules}, **options)


@pytest.fixture
def problems(tmp_path):
    """Finds the problems of an adapter with more tensors, by their shapes, and with other keys."""
    numbers = itertools.count()

    def found(layout=LAYOUT, tensors=None, modules=MODULES, **config):
        draft = good(modules, **config)
        draft.tensors |= {name: torch.ones(shape) for name, shape in (tensors or {}).items()}
        return validate(draft.write(tmp_path / str(next(numbers))), layout)

    return found


def test_modules_that_the_base_leaves_out_or_only_vllm_knows_are_left_alone(problems):
    # As PEFT stacks experts: what the sizes should be is vLLM's affair.
    tensors = pair(EXPERTS, (16, 16), (16, 16)) | pair(f"{EXPERTS}.base_layer", (16, 16), (16, 16))
    tensors["base_model.model.mtp.q_proj.lora_A.weight"] = (3,)
    assert problems(special(EXPERTS, naming=ModuleNaming(skipped=("mtp.",))), tensors) == []


@pytest.mark.parametrize(
    "below",
    [
        "lm_head.foo",
        "lm_head.base_layer",
        "model.embed_tokens.x.y",
        "EXPERTS.0.base_layer",
        "EXPERTS.2.up_proj",
        "EXPERTS.1.up_proj.foo",
        "EXPERTS.base_layer.base_layer",
    ],
)
def test_names_below_what_vllm_serves_itself_are_unknown(problems, below):
    """vLLM never looks them up: their requests would be answered by the base model."""
    single = EXPERTS.replace("0", "1")
    layout = special(*(f"{name}{of}" for name in (EXPERTS, single) for of in ("", ".0.up_proj")))
    known = pair(EXPERTS) | pair(f"{EXPERTS}.base_layer") | pair(f"{single}.0.up_proj")
    assert problems(layout, known) == []
    [problem] = problems(layout, known | pair(below.replace("EXPERTS", EXPERTS)))
    assert problem.code in (Code.UNKNOWN_MODULE, Code.LAYER_OUT_OF_RANGE)


@pytest.mark.parametrize(
    ("a", "b", "code"),
    [
        ((4, 16), (16, 4), Code.RANK_NOT_AS_CONFIGURED),
        ((8, 16), (16, 4), Code.RANKS_DIFFER),
        ((8, 16), (128,), Code.WRONG_SHAPE),
    ],
    ids=["other-rank", "two-ranks", "one-dimension"],
)
def test_ranks_are_checked_where_only_vllm_knows_sizes(problems, a, b, code):
    """An expert with another rank than is configured would be scaled by the wrong one."""
    expert = f"{EXPERTS}.0.up_proj"
    [problem] = problems(special(expert), pair(expert, a, b))
    assert problem.code == code


@pytest.mark.parametrize(
    ("module", "a", "b", "code", "words"),
    [
        ("score", (8, 96), (3, 8), None, ""),
        ("score", (8, 96), (2, 8), Code.WRONG_SHAPE, "3 outputs"),
        ("mlp.experts.0.w2", (8, 176), (96, 8), None, ""),
        ("mlp.experts.0.w2", (8, 96), (96, 8), Code.WRONG_SHAPE, "176 inputs"),
        ("mlp.experts", (32, 176), (96, 32), None, ""),
        ("mlp.experts", (32, 176), (64, 32), Code.WRONG_SHAPE, "96 outputs"),
        ("mlp.experts", (64, 176), (96, 64), Code.RANK_NOT_AS_CONFIGURED, "8 times the base model"),
        ("mlp.experts", (8, 176), (96, 8), Code.RANK_NOT_AS_CONFIGURED, "4 experts"),
        ("mlp.experts", (32, 176), (96, 16), Code.RANKS_DIFFER, "as lora_A"),
    ],
)
def test_experts_and_heads_for_classes_have_the_models_sizes(problems, module, a, b, code, words):
    """Slots would hold the part of them that fits."""
    shapes = {
        "score": LinearShape(96, 3),
        "mlp.experts.0.w2": LinearShape(176, 96),
        "mlp.experts": LinearShape(176, 96, experts=4),
        "mlp.experts.base_layer": LinearShape(96, 352, experts=4),
    }
    tensors = pair(module, a, b)
    if module == "mlp.experts":
        tensors |= pair(f"{module}.base_layer", (32, 96), (352, 32))
    found = problems(
        special("score", "mlp.experts", "mlp.experts.0.w2", linear_shapes=shapes),
        tensors,
        target_modules=[*TARGETS, "score", "w2"],
        target_parameters=["gate_up_proj", "down_proj"],
    )
    assert [problem.code for problem in found] == ([code] if code else [])
    assert all(words in str(problem) for problem in found)


@pytest.mark.parametrize("named", ["gate_up_proj", "mlp.experts.gate_up_proj"])
def test_a_refused_parameter_gets_the_hint_about_parameters(problems, named):
    experts, v_proj = (
        replace(LAYOUT, bypassed={module: "vLLM does not"}) for module in (EXPERTS, V1)
    )
    parameters = [named, named.replace("gate_up", "down")]
    [problem] = problems(experts, pair(EXPERTS), target_parameters=parameters)
    assert problem.hint.startswith("train without it in 'target_parameters'")
    [problem] = problems(v_proj, modules=[V1], target_parameters=[named])
    assert problem.hint.startswith("train without it in 'target_modules'")


UNADAPTED = {
    "special": frozenset(),
    "tied": False,
    "bypassed": dict.fromkeys(LAYOUT.special, "vLLM adapts no heads of this model"),
}
"""A model of whose embedding and head vLLM knows, and which it does not adapt."""


@pytest.mark.parametrize("add", [add_embedding, add_head], ids=["embedding", "head"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside-others"])
def test_a_layer_that_vllm_does_not_adapt_is_refused_for_that_reason(tmp_path, add, alone):
    draft = good([] if alone else MODULES)
    add(draft)
    [problem] = validate(draft.write(tmp_path / "adapter"), replace(LAYOUT, **UNADAPTED))
    assert problem.code == Code.UNSUPPORTED_FEATURE
    assert "no effect here: vLLM adapts no heads of this model" in problem.message
    assert "trained on" not in str(problem)


def test_a_dora_adapter_of_a_head_is_refused_as_dora_whatever_vllm_adapts(tmp_path):
    draft = make_dora(good())
    add_head(draft)
    folder = draft.write(tmp_path / "adapter")
    texts = []
    for layout in (LAYOUT, replace(LAYOUT, **UNADAPTED)):
        problems = validate(folder, replace(layout, tied=False, dora=True))
        texts.append([str(each) for each in problems if "lm_head" in each.message])
    assert texts[0] == texts[1]
    assert "of an output head, expected linear layers" in texts[0][0]


def test_some_experts_of_a_layer_may_be_adapted_each_at_its_rank(problems):
    kinds = {"w1": LinearShape(8, 6), "w2": LinearShape(6, 8)}
    shapes = {f"{EXPERTS}.{e}.{kind}": size for e in (0, 1) for kind, size in kinds.items()}
    tensors = pair(f"{EXPERTS}.0.w1", (8, 8), (6, 8)) | pair(f"{EXPERTS}.1.w2", (2, 6), (8, 2))
    config = {
        "target_modules": [*TARGETS, "w1", "w2"],
        "rank_pattern": good().config.get("rank_pattern", {}) | {"experts.1.w2": 2},
    }
    assert problems(special(*shapes, linear_shapes=shapes), tensors, **config) == []


def test_experts_whose_sizes_are_not_known_are_adapted_all_or_none(problems):
    """vLLM packs them together."""
    experts = {f"model.layers.{i}.mlp.experts.{e}.w1" for i in (0, 1) for e in (0, 1)}
    layout, targets = special(*experts), [*TARGETS, "w1"]
    first, second = (f"model.layers.1.mlp.experts.{e}.w1" for e in (0, 1))
    [problem] = problems(layout, pair(first), target_modules=targets)
    assert problem.code == Code.HALF_MISSING
    assert f"{second} is not adapted" in problem.message
    assert problems(layout, pair(first) | pair(second), target_modules=targets) == []


SAVED = {"modules_to_save": ["classifier", "score"]}


def test_a_classification_head_saved_whole_is_accepted_where_the_base_has_one(problems):
    head, with_head = {"base_model.model.score.weight": (2, 96)}, special("score")
    assert problems(with_head, head, **SAVED) == []
    assert problems(with_head, head | {"base_model.model.score.bias": (2,)}, **SAVED) == []
    [problem] = problems(LAYOUT, head, **SAVED)
    assert problem.code == Code.UNKNOWN_TENSOR
    [problem] = problems(with_head, head)
    assert "'score' in 'modules_to_save'" in problem.message


@pytest.mark.parametrize(
    ("shapes", "code", "words"),
    [
        ({}, Code.HALF_MISSING, "no full weight of score"),
        ({"score.bias": (2,)}, Code.HALF_MISSING, "no full weight of score"),
        ({"score.weight": (7, 3, 2)}, Code.WRONG_SHAPE, "[labels, inputs]"),
        ({"score.weight": (2, 96), "score.bias": (3,)}, Code.WRONG_SHAPE, "expected [2]"),
        ({"score.weight": (2, 96), "model.score.weight": (2, 96)}, Code.DUPLICATE_TENSOR, "same"),
        (
            {
                "score.weight": (2, 96),
                "score.lora_A.weight": (8, 96),
                "score.lora_B.weight": (2, 8),
            },
            Code.DUPLICATE_TENSOR,
            "score adapted, or saved whole",
        ),
    ],
    ids=["absent", "bias-alone", "three-dimensions", "other-bias", "twice", "adapted-as-well"],
)
def test_a_head_saved_whole_needs_its_weight_once(problems, shapes, code, words):
    """PEFT fails on a file without it; here, the base model's head would give the answers."""
    tensors = {f"base_model.model.{name}": shape for name, shape in shapes.items()}
    targets = [*TARGETS, "score"]
    [problem] = problems(special("score"), tensors, target_modules=targets, **SAVED)
    assert problem.code == code
    assert words in problem.message


def test_opening_reports_every_problem_of_the_configuration(tmp_path):
    folder = BAD["config-wrong-in-three-ways"].write(tmp_path / "adapter")
    with pytest.raises(AdapterFormatError) as caught:
        config_of((folder / "adapter_config.json").read_bytes())
    assert len(caught.value.problems) == 3
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def restricted_to(*targets: str):
    """The layout of a server that applies adapters to these kinds of module only."""
    return replace(
        LAYOUT,
        slices=tuple(part for part in LAYOUT.slices if part.name.endswith(targets)),
        naming=ModuleNaming(targets=targets),
    )


def test_an_adapter_of_which_nothing_would_be_applied_is_refused(tmp_path):
    """Its requests would be answered by the base model."""
    attention = [name for name in MODULES if "self_attn" in name]
    folder = good(attention).write(tmp_path / "attention")
    layout = restricted_to("gate_proj", "up_proj", "down_proj")
    [problem] = validate(folder, layout)
    assert problem.code == Code.NOTHING_APPLIED
    assert problem.where == name_of("model.layers.0.self_attn.k_proj", "A")
    assert "as all 12 modules of the adapter are (k_proj, o_proj, q_proj, v_proj)" in problem.found
    assert "gate_proj, up_proj, down_proj" in problem.expected
    assert "--lora-target-modules gate_proj up_proj down_proj" in problem.hint
    with pytest.raises(AdapterFormatError):
        take(folder, layout)


def test_targets_that_the_base_model_does_not_have_leave_nothing_to_expect(problems):
    """As after a slip in `--lora-target-modules`."""
    [problem] = problems(replace(restricted_to("q_porj"), special=frozenset()))
    assert problem.code == Code.NOTHING_APPLIED
    assert problem.expected.endswith("(none)")
    assert "--lora-target-modules q_porj" in problem.hint


def test_an_adapter_of_which_something_is_applied_is_served_without_the_rest(tmp_path):
    folder = good().write(tmp_path / "adapter")
    layout = restricted_to("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert validate(folder, layout) == []
    rest = [name for name in MODULES if name.endswith(("q_proj", "v_proj"))]
    ranks = take(folder, layout, LAYOUT).index.ranks
    assert [len(rank.rows) for rank in ranks] == [len(MODULES) - len(rest), len(MODULES)]


def test_an_adapter_that_would_act_in_part_only_is_refused(problems):
    """Without what the base model does with its modules' weights the answers are others."""
    layout = replace(LAYOUT, bypassed={V1: "its attention multiplies with the weights"})
    [problem] = problems(layout)
    assert problem.code == Code.UNSUPPORTED_FEATURE
    assert V1 in problem.where
    assert "its attention multiplies with the weights" in str(problem)


def test_an_adapter_of_another_workers_layers_is_accepted_here(tmp_path):
    """Under pipeline parallelism: that worker checks it, and applies it."""
    folder = good([V1]).write(tmp_path / "adapter")
    here = replace(
        LAYOUT,
        slices=tuple(part for part in LAYOUT.slices if ".layers.1." not in part.name),
        naming=ModuleNaming(others=("model.layers.1.",), roots=frozenset({"model"})),
    )
    assert validate(folder, here) == []
    assert len(take(folder, here).index.ranks[0].rows) == 0


VISION = tuple(f"visual.blocks.{i}.attn.qkv" for i in range(2))
MULTIMODAL = replace(LAYOUT, naming=ModuleNaming(unwrapped=frozenset(VISION)))


def with_vision(draft, *modules: str):
    for module in modules:
        for part, shape in (("A", (8, 5)), ("B", (7, 8))):
            draft.tensors[name_of(module, part)] = torch.ones(shape)
    return draft


def test_an_adapter_of_a_multimodal_model_is_served_without_the_tower_that_vllm_leaves_alone(
    tmp_path,
):
    folder = with_vision(good(), *VISION).write(tmp_path / "adapter")
    assert validate(folder, MULTIMODAL) == []
    assert len(take(folder, MULTIMODAL).index.ranks[0].rows) == len(MODULES)
    # What the model does not have at all is refused.
    folder = with_vision(good(), "visual.blocks.2.attn.qkv").write(tmp_path / "other")
    [problem] = validate(folder, MULTIMODAL)
    assert problem.code in (Code.UNKNOWN_MODULE, Code.LAYER_OUT_OF_RANGE)


def test_an_adapter_of_a_tower_alone_is_refused(tmp_path):
    folder = with_vision(good([]), *VISION).write(tmp_path / "adapter")
    [problem] = validate(folder, MULTIMODAL)
    assert problem.code == Code.NOTHING_APPLIED
    assert "the server applies no adapters to these modules" in problem.hint
    assert "--lora-target-modules" not in problem.hint
    unreached = replace(LAYOUT, naming=ModuleNaming(skipped=("model.",)))
    [problem] = validate(good().write(tmp_path / "layers"), unreached)
    assert problem.code == Code.NOTHING_APPLIED
