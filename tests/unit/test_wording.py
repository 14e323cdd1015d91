"""Messages say `1 adapter` and `2 adapters`, and name the first few of many things."""

import pytest

from vllm_multilora.wording import counted, guess, listed


@pytest.mark.parametrize(
    ("count", "adapters", "copies"),
    [(0, "0 adapters", "0 copies"), (1, "1 adapter", "1 copy"), (2, "2 adapters", "2 copies")],
)
def test_one_is_not_called_several(count: int, adapters: str, copies: str) -> None:
    assert counted(count, "adapter") == adapters
    assert counted(count, "copy", "copies") == copies


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a", "b"], "a, b"), (["a", "b", "c", "d"], "a, b and 2 more")],
)
def test_the_first_names_stand_for_all(names: list[str], text: str) -> None:
    assert listed(names, 2) == text


def test_the_nearest_of_the_known_names_is_suggested() -> None:
    assert guess("splits", ["adapter", "split"]) == "; did you mean 'split'?"
    assert guess("x", ["adapter", "split"]) == ""
