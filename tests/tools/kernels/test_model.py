"""The analytical model: held against published times, and honest about what it leaves open."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tools.kernels import model
from tools.kernels.measure.batches import LAYERS
from tools.kernels.modelled.cases import RANKS, Batch, cases
from tools.kernels.modelled.machine import CALIBRATED, GPUS
from tools.kernels.modelled.ours import candidates_us, ours_us
from tools.kernels.modelled.published import published

ROOT = Path(__file__).parents[3]
ALL_CASES = [batch for max_rank in RANKS for batch in cases(max_rank)]


@pytest.mark.parametrize("each", list(published()), ids=lambda each: each.case)
def test_a_published_time_is_modelled_within_30_percent(each):
    assert abs(each.error) <= 0.3


def test_ten_published_times_are_modelled_and_most_within_15_percent():
    errors = [abs(each.error) for each in published()]
    assert len(errors) == 10
    assert sum(error <= 0.15 for error in errors) >= 8


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_no_time_is_below_that_of_the_least_bytes(layer):
    for gpu in GPUS.values():
        for batch in ALL_CASES:
            found = model.model(layer, batch, gpu)
            times = (*found.ours_us, *(time for both in found.others_us.values() for time in both))
            assert found.floor_us < min(times), batch


def test_slower_memory_takes_more_time_where_bytes_count():
    card = GPUS["H100"]
    slower = replace(card, bandwidth=card.bandwidth / 2)
    for layer in LAYERS.values():
        for batch in cases(64):
            fast, slow = (model.model(layer, batch, gpu) for gpu in (card, slower))
            assert slow.ours_us >= fast.ours_us
            assert slow.others_us["default"] >= fast.others_us["default"]
            if (batch.adapters, batch.ranks) == (64, "64"):
                assert slow.ours_us[0] > 1.5 * fast.ours_us[0]


def test_the_pessimistic_end_of_a_ratio_is_never_the_better_one():
    for layer in LAYERS.values():
        for batch in ALL_CASES:
            found = model.model(layer, batch, GPUS["H100"])
            for name in model.CONTENDERS:
                calibrated, pessimistic = found.ratios(name)
                assert calibrated < pessimistic


def test_tuning_vllm_never_makes_it_slower():
    for layer in LAYERS.values():
        for batch in ALL_CASES:
            others = model.model(layer, batch, GPUS["H100"]).others_us
            assert others["tuned"] <= others["default"]


def test_the_command_gives_every_case_of_every_layer_as_modelled(capsys):
    for max_rank in RANKS:
        assert model.main(["--json", "--card", "H200", "--max-rank", str(max_rank)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == len(list(cases(max_rank))) * len(LAYERS)
        assert all(line["card"] == "H200" and "modelled" in line for line in lines)
        assert {line["max_rank"] for line in lines} == {max_rank}


def test_the_table_keeps_what_was_measured_in_a_column_of_its_own():
    heads, _, *rows = model.table(GPUS["H100"], 64)
    assert heads.endswith("| measured |")
    assert all(row.endswith("| nothing yet |") for row in rows)


def test_ratios_below_the_least_that_is_quoted_are_not_printed(capsys):
    printed = []
    for arguments in (["--losses"], *(["--max-rank", str(rank)] for rank in RANKS)):
        assert model.main(arguments) == 0
        printed += capsys.readouterr().out.splitlines()
    ratios = [float(found) for line in printed for found in re.findall(r"\b\d\.\d\d\b", line)]
    assert len(ratios) > 400
    assert min(ratios) >= model.LOWEST_RATIO
    assert any(f"below {model.LOWEST_RATIO}" in line for line in printed)


def test_losses_are_all_cases_in_which_another_is_faster(capsys):
    assert model.main(["--losses"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(RANKS) * len(model.CONTENDERS)
    slower, layers = 0, set()
    for batch in cases(64):
        for layer in LAYERS.values():
            found = model.model(layer, batch, GPUS["H100"])
            if found.ratios("tuned")[0] > 1:
                slower += 1
                layers.add(layer.name)
    (row,) = (row for row in rows if row.startswith("| 64 | vLLM tuned"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{slower} of {len(list(cases(64))) * len(LAYERS)}"
    assert set(cells[4].split(", ")) == layers


def test_readmes_quote_no_modelled_time():
    for name in ("README.md", "kernels/README.md"):
        text = (ROOT / name).read_text()
        assert not re.search(r"\d\s*(µs|microseconds)", text), name
        assert "modelled" not in text, name


@pytest.mark.parametrize("card", GPUS)
def test_rows_without_tensor_cores_gain_a_quarter_and_an_early_start_gains_less(card):
    gpu = GPUS[card]
    gains: dict[str, list[float]] = {}
    for batch in cases(64):
        for layer in LAYERS.values():
            own = ours_us(layer, batch, gpu, CALIBRATED)
            for name, other in candidates_us(layer, batch, gpu).items():
                gains.setdefault(name, []).append(own / other)
    assert max(gains["vector_rows"]) > model.ENOUGH > max(gains["early"]) > 1


def test_rows_without_tensor_cores_are_for_few_rows_of_an_adapter():
    gpu, layer = GPUS["H100"], LAYERS["8b.qkv"]
    assert "vector_rows" in candidates_us(layer, Batch(32, 8, "64"), gpu)
    assert "vector_rows" not in candidates_us(layer, Batch(8, 1, "64"), gpu)


def test_the_command_shows_what_each_candidate_gains_most_for(capsys):
    assert model.main(["--candidates"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["early", "vector_rows"]
