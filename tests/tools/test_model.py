"""The analytical model: never below what must move, and apart from what was measured."""

import json
from dataclasses import replace

import pytest

from tools.kernels import model
from tools.kernels.measure.batches import LAYERS


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_no_time_is_below_that_of_the_least_bytes(layer):
    for gpu in model.GPUS.values():
        for batch in model.cases():
            found = model.model(layer, batch, gpu)
            assert found.floor < min(found.ours, found.vllm, found.specialised), batch


def test_slower_memory_takes_more_time_where_bytes_count():
    card = model.GPUS["H100"]
    slower = replace(card, bandwidth=card.bandwidth / 2)
    for layer in LAYERS.values():
        for batch in model.cases():
            times = [model.model(layer, batch, gpu) for gpu in (card, slower)]
            assert times[1].ours >= times[0].ours
            assert times[1].vllm >= times[0].vllm
            if (batch.adapters, batch.ranks) == (64, "64"):
                assert times[1].ours > 1.5 * times[0].ours


def test_the_command_gives_every_case_of_every_layer_as_modelled(capsys):
    assert model.main(["--json", "--card", "H200"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == len(list(model.cases())) * len(LAYERS)
    assert all(line["card"] == "H200" and "modelled" in line for line in lines)


def test_the_table_keeps_what_was_measured_in_a_column_of_its_own():
    heads, _, *rows = model.table(model.GPUS["H100"])
    assert heads.endswith("| measured |")
    assert all(row.endswith("| nothing yet |") for row in rows)
