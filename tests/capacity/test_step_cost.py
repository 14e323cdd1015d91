"""The model of a step's time: what it is a sum of, and that a fit finds the parts."""

import random
from itertools import product

import pytest

from vllm_multilora.slots.budget import MIB
from vllm_multilora.toolbox.capacity.fitting import Sample, fit, line
from vllm_multilora.toolbox.capacity.step_cost import TERMS, StepBatch, StepCost, pairs_of

SECONDS = {term: 0.001 * n for n, term in enumerate(TERMS, 1)}


def batches():
    amounts = (0, 7, 20, 50), (1, 2), (0, 1, 9), (0, 2, 5), (False, True)
    for length, prompts, rows, size, is_loading in product(*amounts):
        prompt = length * prompts
        yield StepBatch(
            prompt_tokens=prompt,
            rows=rows + (prompt > 0),
            prompt_pairs=prompts * pairs_of(length),
            context_tokens=rows * (20 + length % 3),
            adapter_bytes=size * MIB,
            adapted_tokens=(prompt + rows) * (size > 0),
            adapted_token_bytes=(prompt + rows) * size * MIB,
            is_loading=is_loading,
        )


def test_each_part_counts_what_it_is_named_after():
    batch = StepBatch(
        prompt_tokens=10,
        rows=3,
        prompt_pairs=pairs_of(10, before=4),
        context_tokens=60,
        adapter_bytes=6 * MIB,
        adapted_tokens=11,
        adapted_token_bytes=33 * MIB,
        is_loading=True,
    )
    amounts = dict(zip(TERMS, batch.amounts, strict=True))
    assert amounts == {
        "step": 1,
        "prompts_at_all": 1,
        "prompt_token": 10,
        "prompt_token_squared": 100,
        "generated_token": 3,
        "prompt_pair": 5 + 6 + 7 + 8 + 9 + 10 + 11 + 12 + 13 + 14,
        "context_token": 60,
        "adapters_at_all": 1,
        "adapter_mib": 6,
        "adapted_token": 11,
        "adapted_token_mib": 33,
        "row_beside_prompts": 3,
        "load_beside": 1,
    }


def test_a_fit_finds_the_parts_and_has_no_residual():
    cost = StepCost(SECONDS)
    samples = [
        Sample(str(n), batch, cost.of(batch) + 0.25 * has_request, has_request=has_request)
        for n, (batch, has_request) in enumerate(product(batches(), (False, True)))
    ]
    found = fit(samples)
    assert found.seconds == pytest.approx(SECONDS)
    assert found.request_s == pytest.approx(0.25)
    assert found.residual.rms == pytest.approx(0, abs=1e-9)


def test_a_step_costs_what_its_case_takes_on_average_outliers_included():
    seconds = [1.0] * 19 + [3.0]
    found = fit([Sample("one", StepBatch(), each) for each in seconds])
    assert found.seconds["step"] == pytest.approx(1.1)
    assert set(found.seconds.values()) - {found.seconds["step"]} == {0.0}


def test_a_case_weighs_the_same_however_often_it_was_measured():
    once = fit([Sample("short", StepBatch(), 1.0), Sample("long", StepBatch(), 2.0)])
    often = fit([*[Sample("short", StepBatch(), 1.0)] * 24, Sample("long", StepBatch(), 2.0)])
    assert often.seconds["step"] == pytest.approx(once.seconds["step"]) == pytest.approx(1.2)


def test_nothing_costs_less_than_nothing():
    """Larger prompts that take less time are noise: the term is left out."""
    found = fit([Sample(str(n), StepBatch(prompt_tokens=n), 1 - n / 100) for n in range(1, 5)])
    assert found.seconds["prompt_token"] == 0
    # All of these steps have prompts: what of it is the steps' own cannot be told.
    fixed = found.seconds["step"] + found.seconds["prompts_at_all"]
    assert fixed == pytest.approx(0.975, abs=0.001)


def test_the_residual_names_the_case_that_fits_worst():
    dice = random.Random(0)
    samples = [Sample("as modelled", StepBatch(), 1 + dice.uniform(-0.1, 0.1)) for _ in range(50)]
    found = fit([*samples, Sample("odd", StepBatch(), 2.0)])
    residual = found.residual
    assert (residual.worst_case, residual.steps) == ("odd", 51)
    assert residual.worst == pytest.approx(found.seconds["step"] / 2 - 1)
    assert 0 < residual.rms < -residual.worst


def test_without_steps_there_is_no_fit():
    with pytest.raises(ValueError, match="no step was timed"):
        fit([])


def test_a_line_has_no_negative_part():
    assert line([(1, 3.0), (2, 5.0), (3, 7.0)]) == pytest.approx((1, 2))
    assert line([(2, 1.0), (4, 4.0)])[0] == 0
    assert line([(2, 4.0), (4, 2.0)])[1] == 0
