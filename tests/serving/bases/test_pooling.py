"""Embeddings: each adapter's equal PEFT's, and one whose files have gone hurts nobody else."""

import json
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch

from tests.attacks.poison import poisoned
from tests.attacks.site import HOSTILE_NAMES, STRANGE_NAMES
from vllm_multilora.tenants.keys import stored

from ..engine import BEFORE_0_32, running_engine
from ..models.cases import Scenario
from ..models.recipes import EMBEDDING_RECIPE, LINEAR_RECIPES
from ..server import VllmServer

pytestmark = pytest.mark.serving

BASE = "base"
GONE = "gone"
POISON = "poison"
GOOD = (None, *(recipe.name for recipe in LINEAR_RECIPES[:3]))
WITH_HEAD = EMBEDDING_RECIPE.name
PROMPT = [7, 21, 88, 140, 3, 250, 64]
KEY, ACME = "sk-operator", "sk-acme"


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    truth: dict[str | None, torch.Tensor]

    def embed(self, name: str | None) -> httpx.Response:
        body = {"model": name or BASE, "input": PROMPT}
        return self.server.post("/v1/embeddings", body)

    def assert_serves(self, name: str | None) -> None:
        response = self.embed(name)
        assert response.status_code == 200, f"{response.text}\n{self.server.log_tail()}"
        found = torch.tensor(response.json()["data"][0]["embedding"])
        torch.testing.assert_close(found, self.truth[name], rtol=1e-4, atol=1e-5)


def reference_embeddings(
    scenario: Scenario, names: Iterable[str | None]
) -> dict[str | None, torch.Tensor]:
    """The last token's hidden state, normalised, as PEFT and transformers compute it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found: dict[str | None, torch.Tensor] = {}
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(scenario.base, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, scenario.adapters[name])
        with torch.no_grad():
            states = model(torch.tensor([PROMPT]), output_hidden_states=True).hidden_states
        found[name] = torch.nn.functional.normalize(states[-1][0, -1], dim=0)
    return found


@pytest.fixture(scope="module")
def truth(llama: Scenario) -> dict[str | None, torch.Tensor]:
    return reference_embeddings(llama, (*GOOD, WITH_HEAD))


@pytest.fixture(scope="module")
def deployment(
    llama: Scenario,
    truth: dict[str | None, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("pooling")
    gone = shutil.copytree(llama.adapters[LINEAR_RECIPES[4].name], folder / GONE)
    poison = poisoned(llama.adapters[GOOD[2] or ""], folder / POISON, "float32")
    adapters = {name: llama.adapters[name] for name in GOOD if name}
    adapters |= {GONE: gone, POISON: poison}
    tenants = folder / "tenants.json"
    acme = {"keys": [stored(ACME)], "adapters": [GOOD[1], "my-*"]}
    tenants.write_text(json.dumps({"tenants": {"acme": acme}}))
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE, "--runner", "pooling", "--convert", "embed"),
        *("--multilora-tenants", str(tenants)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        log=folder / "vllm.log",
        api_key=KEY,
    ) as server:
        for name in GOOD[1:]:  # two of them push the adapter out of host memory
            assert server.post("/v1/embeddings", {"model": name, "input": PROMPT}).is_success
        shutil.rmtree(gone)
        yield Deployment(server, truth)


@pytest.mark.smoke("embeddings")
def test_embeddings_equal_peft_beside_an_adapter_whose_files_have_gone(
    deployment: Deployment,
) -> None:
    with ThreadPoolExecutor(16) as pool:
        served = [pool.submit(deployment.assert_serves, name) for name in (*GOOD, *GOOD)]
        failed = [pool.submit(deployment.embed, GONE) for _ in range(3)]
    for future in served:
        future.result()
    for response in (future.result() for future in failed):
        assert response.status_code == 404, f"{response.text}\n{deployment.server.log_tail()}"
        assert GONE in response.json()["error"]["message"]


@pytest.mark.smoke("embeddings", "quarantine")
def test_an_adapter_whose_numbers_overflow_changes_nobody_elses_embeddings(
    deployment: Deployment,
) -> None:
    """It is taken out of service by its first request, which is told why; so are all others."""
    before = {name: deployment.embed(name).json()["data"] for name in GOOD}
    with ThreadPoolExecutor(16) as pool:
        served = [pool.submit(deployment.assert_serves, name) for name in (*GOOD, *GOOD)]
        guilty = [pool.submit(deployment.embed, POISON) for _ in range(4)]
        served += [pool.submit(deployment.assert_serves, name) for name in (*GOOD, *GOOD)]
    for future in served:
        future.result()
    for response in (*(future.result() for future in guilty), deployment.embed(POISON)):
        assert response.status_code == 400, f"{response.text}\n{deployment.server.log_tail()}"
        message = response.json()["error"]["message"]
        assert POISON in message
        assert "quarantined" in message
    rows = {row["id"]: row for row in deployment.server.get("/v1/lora_adapters").json()["data"]}
    assert rows[POISON]["state"] == "quarantined"
    assert {rows[name]["last_error"] for name in GOOD if name} == {None}
    after = {name: deployment.embed(name).json()["data"] for name in GOOD}
    assert after == before, "asked for alone, they are the same to the bit"


ENDPOINTS = {
    "/v1/embeddings": {"input": PROMPT},
    "/v2/embed": {"texts": ["t7 t21"], "embedding_types": ["float"]},
    "/pooling": {"input": PROMPT},
    "/score": {"queries": "t7", "documents": ["t8"]},
    "/v1/score": {"queries": "t7", "documents": ["t8"]},
    "/rerank": {"query": "t7", "documents": ["t8"]},
    "/v1/rerank": {"query": "t7", "documents": ["t8"]},
    "/v2/rerank": {"query": "t7", "documents": ["t8"]},
}


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_model_of_a_hostile_name_is_not_found(deployment: Deployment, path: str) -> None:
    for name in (HOSTILE_NAMES | STRANGE_NAMES).values():
        body = json.dumps({**ENDPOINTS[path], "model": name}).encode()  # lone surrogates included
        headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        url = f"{deployment.server.url}{path}"
        response = httpx.post(url, content=body, headers=headers, timeout=60, trust_env=False)
        assert response.status_code in (400, 404), f"{name[:40]!a}: {response.text[:500]}"
        assert len(response.content) < 2_000


@pytest.mark.parametrize("path", ENDPOINTS)
def test_tenants_are_kept_apart(deployment: Deployment, path: str) -> None:
    def ask(name: str | None, key: str | None = ACME) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{deployment.server.url}{path}"
        body = {"model": name or BASE, **ENDPOINTS[path]}
        return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)

    own = ask(GOOD[1])
    assert own.status_code == 200, f"{own.text}\n{deployment.server.log_tail()}"
    assert ask(GOOD[1], None).status_code == 401
    answers = {name or BASE: ask(name) for name in (GOOD[2], "none", "my-none", None)}
    assert {answer.status_code for answer in answers.values()} == {404}
    texts = {
        answer.text.replace(f"`{name}`", "NAME").replace(answer.headers["x-request-id"], "ID")
        for name, answer in answers.items()
    }
    assert len(texts) == 1, texts


PICTURE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
MEDIA = {
    "/v1/embeddings": {"messages": [{"role": "user", "content": PICTURE}]},
    "/v2/embed": {"images": ["data:image/png;base64,AA=="]},
    "/pooling": {"data": {"anything": 1}},
    "/score": {"queries": "t7", "documents": [{"content": PICTURE}]},
    "/v2/rerank": {"query": "t7", "documents": [{"content": PICTURE}]},
}


@pytest.mark.parametrize("path", MEDIA)
def test_tenant_sends_no_media_where_none_are_allowed(deployment: Deployment, path: str) -> None:
    answer = httpx.post(
        f"{deployment.server.url}{path}",
        json={"model": GOOD[1], **MEDIA[path]},
        headers={"Authorization": f"Bearer {ACME}"},
        timeout=60,
        trust_env=False,
    )
    assert answer.status_code == 400, answer.text
    field = next(iter(MEDIA[path].keys() - {"queries", "query"}))
    assert answer.json()["error"]["param"] == field


@pytest.mark.smoke("embeddings")
def test_offline_a_failed_request_is_reported_beside_the_others_embeddings(
    llama: Scenario, truth: dict[str | None, torch.Tensor], tmp_path: Path
) -> None:
    """An adapter that has changed the head for tokens, too, is an adapter of embeddings."""
    from vllm.lora.request import LoRARequest

    served = {name: llama.adapters[name] for name in (GOOD[1], WITH_HEAD) if name}
    loras = [
        *(LoRARequest(name, llama.adapter_id(name), str(path)) for name, path in served.items()),
        LoRARequest(GONE, 90, str(tmp_path / GONE)),
        None,
    ]
    with running_engine(
        llama.base, in_process=True, runner="pooling", convert="embed", skip_tokenizer_init=False
    ) as llm:
        answers = llm.embed(
            [{"prompt_token_ids": PROMPT}] * len(loras), lora_request=loras, use_tqdm=False
        )
    gone = answers.pop(-2)
    for answer, name in zip(answers, (*served, None), strict=True):
        assert getattr(answer, "error", None) is None  # before 0.32, vLLM has none then
        torch.testing.assert_close(
            torch.tensor(answer.outputs.embedding), truth[name], rtol=1e-4, atol=1e-5
        )
    assert gone.outputs.embedding == []
    if not BEFORE_0_32:  # whose answers have no place for it
        assert gone.error.code == "gone"
        assert GONE in gone.error.message
