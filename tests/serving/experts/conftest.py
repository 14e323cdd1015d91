"""Models of mixtures of experts with adapters, each made once."""

from __future__ import annotations

import pytest

from .families import FAMILIES, Mixture, family_scenario


@pytest.fixture(autouse=True)
def groups_of_experts() -> None:
    """An engine in this process makes its groups of workers anew.

    An earlier engine has left its own, and experts need one more than other models.
    """
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()


@pytest.fixture(scope="session")
def scenarios() -> dict[str, Mixture]:
    """The families' scenarios that are there already."""
    return {}


@pytest.fixture(params=FAMILIES)
def model(
    request: pytest.FixtureRequest,
    scenarios: dict[str, Mixture],
    tmp_path_factory: pytest.TempPathFactory,
) -> Mixture:
    """A base model with adapters of its experts, its router and the expert that tokens share."""
    name = request.param
    if name not in scenarios:
        scenarios[name] = family_scenario(name, tmp_path_factory.mktemp(name))
    return scenarios[name]
