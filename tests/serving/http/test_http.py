"""``vllm serve`` answers concurrent requests for many adapters, each as PEFT does."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ..completions import ask, body, token_ids
from ..models.cases import Case, Scenario
from ..models.recipes import EMBEDDING_RECIPE, LINEAR_RECIPES
from ..server import VllmServer

pytestmark = pytest.mark.serving

BASE = "base"
SAGEMAKER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
NAMES = (None, *(recipe.name for recipe in (*LINEAR_RECIPES, EMBEDDING_RECIPE)))


@pytest.fixture(scope="module")
def server(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "128", "--max-num-seqs", "16", "--block-size", "32"),
        *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "6", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in llama.adapters.items())),
        log=tmp_path_factory.mktemp("server") / "vllm.log",
        new_interpreter=True,
    ) as running:
        yield running


def complete(server: VllmServer, case: Case) -> tuple[int, ...]:
    """The token ids of the server's completion of one case."""
    response = ask(server, case.adapter or BASE, case)
    assert response.status_code == 200, f"{response.text}\n{server.log_tail()}"
    assert response.json()["model"] == (case.adapter or BASE)
    return token_ids(response)


@pytest.fixture(scope="module")
def completions(server: VllmServer, llama: Scenario) -> dict[str | None, list[bool]]:
    """Per adapter, which of its cases came back as PEFT's tokens, all having been sent at once."""
    with ThreadPoolExecutor(max_workers=len(llama.cases)) as pool:
        found = list(pool.map(lambda case: complete(server, case), llama.cases))
    return {
        name: [
            tokens == case.expected.tokens
            for tokens, case in zip(found, llama.cases, strict=True)
            if case.adapter == name
        ]
        for name in NAMES
    }


def test_models_route_lists_the_base_and_every_adapter(server: VllmServer, llama: Scenario) -> None:
    models = server.get("/v1/models").json()["data"]
    assert {model["id"]: model["parent"] for model in models} == {
        BASE: None,
        **dict.fromkeys(llama.adapters, BASE),
    }
    assert len({model["max_model_len"] for model in models} - {None}) == 1


def test_a_models_own_route_says_what_the_list_does(server: VllmServer) -> None:
    for model in server.get("/v1/models").json()["data"]:
        alone = server.get(f"/v1/models/{model['id']}").json()
        made_anew = {"created": 0, "permission": []}
        assert alone | made_anew == model | made_anew
    missing = server.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "The model `nobody` does not exist."


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name or "base")
def test_concurrent_requests_answer_as_peft(
    completions: dict[str | None, list[bool]], name: str | None
) -> None:
    assert completions[name]
    assert all(completions[name])


def test_sagemakers_route_looks_at_the_body_where_its_header_names_nobody(
    server: VllmServer, llama: Scenario
) -> None:
    def invoke(model: str, headers: dict[str, str]) -> httpx.Response:
        content = body(model, case)
        return httpx.post(
            f"{server.url}/invocations", json=content, headers=headers, timeout=60, trust_env=False
        )

    one, other = (recipe.name for recipe in LINEAR_RECIPES[:2])
    case = llama.cases_of(one)[0]
    assert token_ids(invoke(one, {})) == case.expected.tokens
    assert token_ids(invoke(one, {SAGEMAKER_HEADER: ""})) == case.expected.tokens
    assert token_ids(invoke(other, {SAGEMAKER_HEADER: one})) == case.expected.tokens
    assert invoke("nobody", {}).status_code == 404


def test_an_unknown_adapter_is_not_found(server: VllmServer) -> None:
    response = server.post("/v1/completions", {"model": "nobody", "prompt": [1], "max_tokens": 1})
    assert response.status_code == 404
    assert "nobody" in response.json()["error"]["message"]


def test_the_server_is_healthy_afterwards(server: VllmServer) -> None:
    assert server.get("/health").status_code == 200
