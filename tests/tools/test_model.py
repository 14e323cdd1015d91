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


def gains(card: str) -> dict[str, dict[tuple[str, model.Batch], float]]:
    """How many times faster each candidate is, by layer and batch."""
    gpu, found = model.GPUS[card], {}
    for batch in model.cases():
        for name, layer in LAYERS.items():
            own = model.model(layer, batch, gpu).ours
            for candidate, other in model.candidates(layer, batch, gpu).items():
                found.setdefault(candidate, {})[name, batch] = own / other
    return found


@pytest.mark.parametrize("card", model.GPUS)
def test_what_can_be_tuned_is_what_the_model_expects_a_quarter_from(card):
    """And clusters, which Triton cannot express; a branch beside the base's product gains less."""
    found = gains(card)
    one = model.Batch(1, 1, "16")
    assert found["early"]["8b.qkv", one] == max(found["early"].values()) > model.ENOUGH
    assert found["vector_rows"]["70b.down", one] == max(found["vector_rows"].values())
    assert found["vector_rows"]["70b.down", one] > model.ENOUGH
    assert max(found["beside"].values()) < 1.2
    assert max(found["cluster"].values()) > model.ENOUGH


def test_rows_without_tensor_cores_are_for_few_rows_of_an_adapter():
    for _, batch in gains("H100")["vector_rows"]:
        assert batch.tokens <= 4 * batch.adapters


def test_the_command_shows_what_each_candidate_gains_most_for(capsys):
    assert model.main(["--candidates"]) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == list(gains("H100"))
    assert "| early | 1.29 | 8b.qkv, 1 tokens, 1 adapters, 8: 5.8 to 4.5 µs |" in rows[0]
