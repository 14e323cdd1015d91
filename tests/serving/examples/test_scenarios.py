"""The scenarios are able to show a mistake: without that, parity would prove nothing."""

import pytest

from ..models.cases import MIN_MARGIN, PROMPT_LENGTHS, Scenario

pytestmark = pytest.mark.serving


@pytest.fixture(params=["llama", "qwen2"])
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return request.getfixturevalue(request.param)


def test_every_adapter_and_the_base_have_a_prompt_of_each_length(scenario: Scenario) -> None:
    found = [(case.adapter, len(case.prompt)) for case in scenario.cases]
    assert found == [
        (name, length) for length in PROMPT_LENGTHS for name in (None, *scenario.adapters)
    ]


def test_no_step_is_a_near_tie(scenario: Scenario) -> None:
    assert min(case.expected.min_margin for case in scenario.cases) >= MIN_MARGIN


def test_continuations_are_no_loops(scenario: Scenario) -> None:
    variety = [len(set(case.expected.tokens)) for case in scenario.cases]
    assert sum(variety) / len(variety) > 8


def test_log_probabilities_are_graded(scenario: Scenario) -> None:
    """Neither certain nor flat: a wrong delta must move them."""
    chosen = [value for case in scenario.cases for value in case.expected.logprobs]
    assert -1.5 < sum(chosen) / len(chosen) < -0.1
