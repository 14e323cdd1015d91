"""Validation: every bad adapter of the corpus has exactly its problems, no valid one has any."""

import errno
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch

from vllm_multilora.adapters import (
    AdapterCheckpoint,
    AdapterError,
    AdapterFormatError,
    Code,
    Limits,
    pack,
    validate,
)
from vllm_multilora.adapters.placement import left_out_modules

from .corpus import BAD, LAYOUT, VALID
from .corpus.draft import V1, good, name_of
from .corpus.headers import rewrite
from .corpus.llama_layout import MODULES


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_a_bad_adapter_has_exactly_its_problems(case, tmp_path):
    folder = case.write(tmp_path / "adapter")
    problems = validate(folder, LAYOUT)
    assert [problem.code for problem in problems] == list(case.codes)
    first = problems[0]
    assert str(folder / case.file) in first.message
    assert all(word in str(first) for word in case.words), str(first)
    for problem in problems:
        assert problem.found
        assert problem.expected
        assert problem.where in problem.message
        assert json.loads(json.dumps(problem.as_dict()))["code"] == problem.code.value


@pytest.mark.parametrize("case", VALID.values(), ids=VALID)
def test_a_valid_adapter_has_no_problem_and_is_packed(case, tmp_path):
    folder = case.write(tmp_path / "adapter")
    assert validate(folder, LAYOUT) == []
    with AdapterCheckpoint.open(folder) as checkpoint:
        assert validate(checkpoint, LAYOUT) == []
        assert pack(checkpoint, LAYOUT).nbytes > 0


def test_the_corpus_is_large_and_covers_every_code():
    assert len(BAD) >= 60
    assert len(VALID) >= 20
    # Of these no folder can be an example: they are about limits, permissions, places, moments and
    # the server's settings.
    elsewhere = {
        Code.FILE_UNREADABLE,
        Code.FILE_CHANGED,
        Code.TOO_MANY_TENSORS,
        Code.NOT_ALLOWED,
        Code.NOTHING_APPLIED,
        Code.NOT_PICKLED_TENSORS,
    }
    assert {code for case in BAD.values() for code in case.codes} | elsewhere == set(Code)


SEEN_IN_VALUES = {Code.NOT_FINITE, Code.OVERFLOW, Code.FILE_TOO_LARGE}
SEEN_UNREAD = [case for case in BAD.values() if not SEEN_IN_VALUES & set(case.codes)]


@pytest.mark.parametrize("case", SEEN_UNREAD, ids=lambda case: case.name)
def test_packing_refuses_what_can_be_seen_without_the_values(case, tmp_path):
    """Loading is safe even where nobody has asked for validation first."""
    folder = case.write(tmp_path / "adapter")
    with pytest.raises(AdapterError) as caught, AdapterCheckpoint.open(folder) as checkpoint:
        pack(checkpoint, LAYOUT)
    assert {problem.code for problem in caught.value.problems} <= set(case.codes)


def test_values_are_left_unread_if_asked(tmp_path):
    folder = BAD["a-with-one-nan"].write(tmp_path / "adapter")
    assert validate(folder, LAYOUT, check_finite=False) == []


def test_overflow_is_judged_by_the_type_of_the_slots(tmp_path):
    draft = good()
    name = next(name for name in draft.tensors if ".lora_A." in name)
    draft.tensors[name][0, 0] = 1e5
    folder = draft.write(tmp_path / "adapter")
    half = replace(LAYOUT, dtype=torch.float16)
    assert validate(folder, LAYOUT) == []
    [problem] = validate(folder, half)
    assert problem.code == Code.OVERFLOW
    assert problem.where == name
    assert "at most 65504" in problem.message


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (Limits(config_bytes=10), Code.FILE_TOO_LARGE),
        (Limits(header_bytes=10), Code.HEADER_TOO_LARGE),
        (Limits(tensors=41), Code.TOO_MANY_TENSORS),
        (Limits(total_bytes=1000), Code.FILE_TOO_LARGE),
    ],
    ids=["config", "header", "tensors", "total"],
)
def test_limits_are_the_callers(tmp_path, limits, code):
    folder = good().write(tmp_path / "adapter")
    assert [problem.code for problem in validate(folder, LAYOUT, limits=limits)] == [code]


def test_sizes_that_only_vllm_knows_are_bounded_loosely():
    experts = replace(LAYOUT, special=LAYOUT.special | {"model.layers.0.mlp.experts"})
    assert Limits().most_bytes(experts) > 50 * Limits().most_bytes(LAYOUT)


def test_a_file_truncated_meanwhile_is_a_problem(tmp_path):
    folder = good().write(tmp_path / "adapter")
    with AdapterCheckpoint.open(folder) as checkpoint:
        os.truncate(checkpoint.tensors_path, checkpoint.tensors_path.stat().st_size - 8)
        [problem] = validate(checkpoint, LAYOUT)
    assert problem.code == Code.FILE_CHANGED
    assert "the file ends inside" in problem.message


def test_a_file_that_cannot_be_read_is_a_problem(tmp_path, monkeypatch):
    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = good().write(tmp_path / "adapter")
    monkeypatch.setattr("os.pread", fail)
    [problem] = validate(folder, LAYOUT)
    assert problem.code == Code.FILE_UNREADABLE
    assert "Input/output error" in problem.message


def test_a_folder_that_is_no_path_is_a_problem():
    [problem] = validate("no\0path", LAYOUT)
    assert problem.code == Code.FOLDER_MISSING


def test_names_that_are_long_or_cannot_be_encoded_are_shown_short_and_escaped(tmp_path):
    draft = good()
    rewrite(draft, lambda header: header | {"\ud800" + "x" * 10_000 + "\n": {"dtype": "Q"}})
    [problem] = validate(draft.write(tmp_path / "adapter"), LAYOUT)
    assert problem.code == Code.HEADER_ENTRY
    assert len(problem.message) < 1000
    assert problem.message.isprintable()


def test_modules_that_the_base_leaves_out_or_only_vllm_knows_are_left_alone(tmp_path):
    draft = good()
    draft.tensors["base_model.model.mtp.q_proj.lora_A.weight"] = torch.zeros(3)
    experts = "model.layers.0.mlp.experts"
    for part in "AB":  # as PEFT stacks experts: what the sizes should be is vLLM's affair
        draft.tensors[name_of(experts, part)] = torch.ones(16, 16)
    layout = replace(
        LAYOUT,
        rename=lambda module: None if module.startswith("mtp.") else module,
        special=LAYOUT.special | {experts},
    )
    assert validate(draft.write(tmp_path / "adapter"), layout) == []


def test_a_classification_head_saved_whole_is_accepted_where_the_base_has_one(tmp_path):
    draft = good(modules_to_save=["score"])
    draft.tensors["base_model.model.score.weight"] = torch.ones(2, 96)
    folder = draft.write(tmp_path / "adapter")
    with_head = replace(LAYOUT, special=LAYOUT.special | {"score"})
    assert validate(folder, with_head) == []
    [problem] = validate(folder, LAYOUT)
    assert problem.code == Code.UNKNOWN_TENSOR
    draft.config["modules_to_save"] = None
    [problem] = validate(draft.write(tmp_path / "unsaid"), with_head)
    assert "'score' in 'modules_to_save'" in problem.message


def test_opening_reports_every_problem_of_the_configuration(tmp_path):
    folder = BAD["config-wrong-in-three-ways"].write(tmp_path / "adapter")
    with pytest.raises(AdapterFormatError) as caught:
        AdapterCheckpoint.open(folder)
    assert len(caught.value.problems) == 3
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


def without(*kinds: str, **changes: object):
    """The layout of a server that applies adapters to other kinds of module only."""
    return replace(
        LAYOUT,
        slices=tuple(part for part in LAYOUT.slices if not part.name.endswith(kinds)),
        rename=lambda module: None if module.endswith(kinds) else module,
        **changes,
    )


def test_an_adapter_of_which_nothing_would_be_applied_is_refused(tmp_path):
    """Its requests would be answered by the base model."""
    attention = [name for name in MODULES if "self_attn" in name]
    folder = good(attention).write(tmp_path / "attention")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    layout = without(*kinds, targets=("gate_proj", "up_proj", "down_proj"))
    [problem] = validate(folder, layout)
    assert problem.code == Code.NOTHING_APPLIED
    assert problem.where == name_of("model.layers.0.self_attn.k_proj", "A")
    assert "as all 12 modules of the adapter are (k_proj, o_proj, q_proj, v_proj)" in problem.found
    assert "gate_proj, up_proj, down_proj" in problem.expected
    assert "--lora-target-modules gate_proj up_proj down_proj" in problem.hint
    with AdapterCheckpoint.open(folder) as checkpoint, pytest.raises(AdapterFormatError):
        pack(checkpoint, layout)


def test_an_adapter_of_layers_that_no_request_comes_through_is_refused(tmp_path):
    folder = good().write(tmp_path / "adapter")
    [problem] = validate(folder, replace(LAYOUT, rename=lambda module: None))
    assert problem.code == Code.NOTHING_APPLIED
    assert "--lora-target-modules" not in problem.hint


def test_an_adapter_of_which_something_is_applied_is_served_without_the_rest(tmp_path):
    folder = good().write(tmp_path / "adapter")
    layout = without("q_proj", "v_proj", targets=("k_proj",))
    assert validate(folder, layout) == []
    with AdapterCheckpoint.open(folder) as checkpoint:
        left_out = left_out_modules(checkpoint.tensors, layout)
        assert left_out == [name for name in MODULES if name.endswith(("q_proj", "v_proj"))]
        assert len(pack(checkpoint, layout).rows) == len(MODULES) - len(left_out)
        assert left_out_modules(checkpoint.tensors, LAYOUT) == []


def test_an_adapter_of_another_workers_layers_is_accepted_here(tmp_path):
    """Under pipeline parallelism: that worker checks it, and applies it."""
    folder = good([V1]).write(tmp_path / "adapter")
    here = replace(
        LAYOUT,
        slices=tuple(part for part in LAYOUT.slices if ".layers.1." not in part.name),
        rename=lambda module: None if ".layers.1." in module else module,
        elsewhere=lambda module: ".layers.1." in module,
    )
    assert validate(folder, here) == []
    with AdapterCheckpoint.open(folder) as checkpoint:
        assert pack(checkpoint, here).nbytes == 0
        assert left_out_modules(checkpoint.tensors, here) == []
