"""The environment and checkpoints of the serving tests, and the server that is attacked."""

from collections.abc import Iterator

import pytest

from tests.attacks.site import Site, running_site
from tests.serving.conftest import fleet, llama
from tests.serving.models.cases import Scenario

__all__ = ["fleet", "llama"]


@pytest.fixture(scope="package")
def site(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_site(llama, tmp_path_factory.mktemp("site") / "files") as running:
        yield running
