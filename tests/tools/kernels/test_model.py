"""The analytical model: held against published times, and honest about what it leaves open."""

import json
import re
from pathlib import Path

import pytest

from tools.kernels import model
from tools.kernels.measure.batches import LAYERS
from tools.kernels.modelled.cases import RANKS, cases
from tools.kernels.modelled.machine import GPUS
from tools.kernels.modelled.published import published

ROOT = Path(__file__).parents[3]
ALL_CASES = [batch for max_rank in RANKS for batch in cases(max_rank)]


@pytest.mark.parametrize("each", list(published()), ids=lambda each: each.case)
def test_a_published_time_is_modelled_within_30_percent(each):
    assert abs(each.error) <= 0.3


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_no_time_is_below_that_of_the_least_bytes(layer):
    for gpu in GPUS.values():
        for batch in ALL_CASES:
            found = model.model(layer, batch, gpu)
            times = (*found.ours_us, *(time for both in found.others_us.values() for time in both))
            assert found.floor_us < min(times), batch


def test_the_command_gives_every_case_of_every_layer_as_modelled(capsys):
    for max_rank in RANKS:
        assert model.main(["--json", "--card", "H200", "--max-rank", str(max_rank)]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == len(list(cases(max_rank))) * len(LAYERS)
        assert all(line["card"] == "H200" and "modelled" in line for line in lines)
        assert {line["max_rank"] for line in lines} == {max_rank}


def test_readmes_quote_no_modelled_time():
    for name in ("README.md", "kernels/README.md"):
        text = (ROOT / name).read_text()
        assert not re.search(r"\d\s*(µs|microseconds)", text), name
        assert "modelled" not in text, name
