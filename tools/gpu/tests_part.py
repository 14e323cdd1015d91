"""A plugin for pytest: the tests of one of several processes, in the order of `tests.TESTS`."""

from __future__ import annotations

import os

import pytest

from tools.gpu.tests import FOLDER, PART, TESTS


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals the tests out in turn, so that each process begins with the most telling ones."""
    worth = {FOLDER / name: place for place, name in enumerate(TESTS)}
    items.sort(key=lambda item: worth.get(item.path, len(TESTS)))
    number, of = map(int, os.environ.get(PART, "0/1").split("/"))
    own, others = items[number::of], [item for i, item in enumerate(items) if i % of != number]
    config.hook.pytest_deselected(items=others)
    items[:] = own
