"""Adapters that trainers' own routes load, also under the base model's name."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ...clients.site import spoil
from ..models.cases import Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer
from .test_registration import BASE, Deployment

pytestmark = pytest.mark.serving

BARE = "bare"
FIRST, SECOND = (recipe.name for recipe in LINEAR_RECIPES[:2])


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("trainer")
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE, BARE),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "64"),
        *("--middleware", "tests.serving.names.trainer_routes.answer"),
        "--multilora-base-alias",
        log=root / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, llama, root)


def push(deployment: Deployment, path: str, name: str, folder: Path) -> httpx.Response:
    return deployment.server.post(path, {"lora_name": name, "lora_path": str(folder)})


def served(deployment: Deployment) -> list[str]:
    return [card["id"] for card in deployment.server.get("/v1/models").json()["data"]]


def base_answers(deployment: Deployment, name: str) -> None:
    deployment.assert_serves(name, deployment.scenario.cases_of(None)[-1])


def test_an_adapter_answers_to_the_base_models_name(deployment: Deployment) -> None:
    base_answers(deployment, BASE)
    for version in (FIRST, SECOND):
        pushed = push(
            deployment, "/load_lora_adapter", BASE, deployment.put(version, f"policy-{version}")
        )
        assert pushed.status_code == 200, pushed.text
        deployment.assert_serves(BASE, deployment.case(version))
        base_answers(deployment, BARE)
        assert sorted(served(deployment)) == sorted((BASE, BARE))
    wrong = deployment.put(FIRST, "wrong")
    spoil(wrong)
    assert push(deployment, "/load_lora_adapter", BASE, wrong).status_code == 400
    assert push(deployment, "/load_lora_adapter", BASE, wrong / "none").status_code == 404
    deployment.assert_serves(BASE, deployment.case(SECOND))
    assert deployment.unload(BASE).status_code == 200
    base_answers(deployment, BASE)


def test_an_adapter_that_others_put_into_vllms_table_is_served(deployment: Deployment) -> None:
    route = "/skyrl/v1/load_lora_adapter"
    for version in (FIRST, SECOND):
        pushed = push(deployment, route, "policy", deployment.put(version, f"version-{version}"))
        assert pushed.status_code == 200, pushed.text
        deployment.assert_serves("policy", deployment.case(version))
        assert "policy" in served(deployment)
    number = pushed.json()["lora_int_id"]
    renamed = {"lora_name": "policy-v2", "lora_int_id": number}
    assert deployment.server.post("/areal_rename", renamed).status_code == 200
    deployment.assert_serves("policy-v2", deployment.case(SECOND))
    assert deployment.ask("policy", deployment.case(SECOND)).status_code == 404
    assert deployment.unload("policy-v2").status_code == 200
    assert deployment.ask("policy-v2", deployment.case(SECOND)).status_code == 404
    assert "policy-v2" not in served(deployment)
