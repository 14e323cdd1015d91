"""Engine cores whose store and workers the test plays."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.engine.fake_engine import Engine


@pytest.fixture
def engines() -> "Iterator[Callable[..., Engine]]":
    """Makes engines; at the end every request is over, and every lease must be given back."""
    from tests.engine.fake_engine import Engine

    made: list[Engine] = []

    def make(**options) -> Engine:
        made.append(Engine(**options))
        return made[-1]

    yield make
    for engine in made:
        for number in [entry.number for entry in engine.adapters.known()]:
            engine.adapters.drop(number)
        engine.all_is_given_back()


@pytest.fixture
def engine(engines) -> "Engine":
    return engines()
