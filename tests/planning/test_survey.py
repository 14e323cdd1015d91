"""What a directory's adapters need, and what that says about a server's settings."""

import json
from dataclasses import replace

import pytest
import torch

from tests.adapters.checkpoints import layout, weights, write
from tests.adapters.packs import take
from vllm_multilora.toolbox.planning.adapter_survey import SurveyError, survey_adapters
from vllm_multilora.toolbox.planning.memory_plan import advise

from .models import HEAD_WIDTHS, MODEL

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
WIDEST = MODEL.layouts[64]


def put(directory, name, rank, **config):
    """An adapter with one module of the rank, and another of a smaller one."""
    tensors = weights({Q0: rank, DOWN1: min(rank, 3)})
    pattern = {"rank_pattern": {DOWN1: min(rank, 3)}}
    return write(directory / name, tensors, rank, 16.0, **(pattern | config))


@pytest.fixture
def directory(tmp_path):
    for name, rank in (("acme", 8), ("globex", 5), ("initech", 16), ("legal", 50)):
        put(tmp_path, name, rank)
    return tmp_path


def test_ranks_and_modules(directory):
    survey = survey_adapters(directory, WIDEST)
    assert {a.name: a.rank for a in survey.adapters} == {
        "acme": 8,
        "globex": 5,
        "initech": 16,
        "legal": 50,
    }
    assert survey.adapters[0].ranks == ((Q0, 8), (DOWN1, 3))
    assert survey.refused == ()


def test_host_bytes_are_those_of_the_packed_adapter(directory):
    """At true rank, each module, and padded as packed adapters are."""
    for adapter in survey_adapters(directory, WIDEST).adapters:
        assert adapter.host_bytes(WIDEST) == take(directory / adapter.name, WIDEST).nbytes


def test_magnitudes_count_in_float32(tmp_path):
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(outputs)
        for module, outputs in ((Q0, 40), (DOWN1, 24))
    }
    tensors = weights({Q0: 4, DOWN1: 4}) | magnitudes
    write(tmp_path / "a", tensors, 4, 8.0, use_dora=True)
    with_dora = replace(WIDEST, dora=True)
    [adapter] = survey_adapters(tmp_path, with_dora).adapters
    assert adapter.kind == "dora"
    assert adapter.host_bytes(with_dora) == take(tmp_path / "a", with_dora).nbytes
    [(name, [problem])] = survey_adapters(tmp_path, WIDEST).refused
    assert (name, problem.code) == ("a", "unsupported-feature")


def test_special_modules_count_with_all_their_elements(tmp_path):
    special = layout(torch.bfloat16, max_rank=64, special=frozenset({"lm_head"}))
    tensors = weights({Q0: 4}) | {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 24),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(30, 4),
    }
    pack = take(write(tmp_path / "a", tensors, 4, 8.0), special)
    raw = {name for name in tensors if "lm_head" in name}
    assert pack.index.tensors.keys() == raw
    [adapter] = survey_adapters(tmp_path, special).adapters
    assert adapter.modules == {Q0, "lm_head"}
    # A survey counts them as what vLLM makes of them; the pack has them in the file's float32.
    packed = pack.block_bytes[: 2 * 1].sum()
    assert adapter.host_bytes(special) == packed + (4 * 24 + 30 * 4) * 2


def test_one_bad_adapter_is_reported_and_does_not_hide_the_others(directory):
    put(directory, "broken", 8, r="eight")
    (directory / "empty").mkdir()  # no adapter at all
    (directory / "headless").mkdir()
    (directory / "headless" / "adapter_config.json").write_text(json.dumps({}))
    survey = survey_adapters(directory, WIDEST)
    assert len(survey.adapters) == 4
    assert [name for name, _ in survey.refused] == ["broken", "headless"]
    assert "'r' is 'eight'" in str(survey.refused[0][1][0])


@pytest.mark.parametrize("kind", ["missing", "a file", "empty"])
def test_a_directory_without_adapters_is_an_error(tmp_path, kind):
    path = tmp_path / "adapters"
    if kind == "a file":
        path.write_text("")
    elif kind == "empty":
        (path / "sub").mkdir(parents=True)
    with pytest.raises(SurveyError, match="sub-folders are adapters"):
        survey_adapters(path, WIDEST)


def test_each_rank_with_whom_it_leaves_out_and_what_it_costs(directory):
    advice = advise(MODEL, survey_adapters(directory, WIDEST), slots=4)
    assert advice.max_lora_rank == 64
    assert [(need.rank, need.fits, need.left_out) for need in advice.needs] == [
        (8, 2, ("initech", "legal")),
        (16, 3, ("legal",)),
        (64, 4, ()),
    ]
    assert [need.bytes for need in advice.needs] == [
        MODEL.by_rank[rank].total(4) for rank in (8, 16, 64)
    ]


def test_layers_that_nobody_adapts(directory):
    unused = advise(MODEL, survey_adapters(directory, WIDEST), slots=4).unused
    assert unused.suffixes == ("v_proj", "lm_head")
    assert unused.targets == ("q_proj", "down_proj")
    # v_proj is 24 x 12; the head has something that does not depend on the slots.
    assert unused.bytes == 4 * 2 * 64 * (24 + 12 + HEAD_WIDTHS) + 8


def test_adapters_of_one_rank_need_that_alone(tmp_path):
    put(tmp_path, "acme", 8)
    put(tmp_path, "globex", 7)
    advice = advise(MODEL, survey_adapters(tmp_path, WIDEST), slots=4)
    assert [need.rank for need in advice.needs] == [8]
