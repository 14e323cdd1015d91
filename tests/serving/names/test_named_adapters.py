"""Routes, resolvers and commands of vLLM's answer for the adapter that is named, and no other."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.poison import poisoned
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE

from .. import completions, template
from ..bases.test_classification import SERVED_RECIPES, classifier, text
from ..engine import KV_CACHE_BYTES, environment, store_folder
from ..exposition import scrape, values
from ..models.cases import NEW_TOKENS, Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

BASE, GONE, POISON = "base", "gone", "poison"
NAMED = tuple(recipe.name for recipe in LINEAR_RECIPES[:3])
FOUND = LINEAR_RECIPES[3].name
"""An adapter that nobody registers: vLLM's filesystem resolver finds it."""
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LENGTH = 23
SAGEMAKER_HEADER = "X-Amzn-SageMaker-Adapter-Identifier"
SETTINGS = (
    *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--chat-template", CHAT),
    *("--max-model-len", "128", "--max-num-seqs", "16", "--block-size", "32"),
    *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
)


def case_of(llama: Scenario, name: str | None) -> Case:
    return next(case for case in llama.cases_of(name) if len(case.prompt) == LENGTH)


@pytest.fixture(scope="module")
def server(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """All plugins of vLLM's are loaded, as nothing says which; one adapter's files have gone."""
    folder = tmp_path_factory.mktemp("named")
    resolved = folder / "resolved"
    shutil.copytree(llama.adapters[FOUND], resolved / FOUND)
    source = llama.adapters[NAMED[0]]
    adapters = {name: llama.adapters[name] for name in NAMED}
    adapters[GONE] = shutil.copytree(source, folder / GONE)
    for number, name in enumerate(POISONS.values()):
        adapters[name] = poisoned(source, folder / name, "float32", number)
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE, *SETTINGS),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        log=folder / "vllm.log",
        env={
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(resolved),
        },
    ) as running:
        for name in NAMED:  # they push the others out of host memory
            body = {"model": name, "prompt": [1], "max_tokens": 1}
            assert running.post("/v1/completions", body).is_success
        shutil.rmtree(adapters[GONE])
        yield running


def words(case: Case) -> list[str]:
    """What PEFT answers."""
    return text(case.expected.tokens).split()


def user(case: Case) -> list[dict[str, str]]:
    return [{"role": "user", "content": text(case.prompt)}]


GENERATING: dict[str, tuple[Callable[[Case], dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "/v1/chat/completions": (
        lambda case: {"messages": user(case), "max_tokens": NEW_TOKENS},
        lambda body: body["choices"][0]["message"]["content"],
    ),
    "/v1/responses": (
        lambda case: {
            "input": text(case.prompt),
            "max_output_tokens": NEW_TOKENS,
            "store": False,
        },
        lambda body: body["output"][0]["content"][0]["text"],
    ),
    "/v1/messages": (
        lambda case: {"messages": user(case), "max_tokens": NEW_TOKENS},
        lambda body: body["content"][0]["text"],
    ),
}


POISONS = {path: f"poison{number}" for number, path in enumerate(GENERATING)}
"""By route: an adapter that overflows in use. In quarantine it would harm no other route."""


@pytest.mark.smoke("chat completions, responses and messages", "vLLM's filesystem resolver")
@pytest.mark.parametrize("path", GENERATING)
def test_each_route_answers_as_peft_for_the_adapter_that_is_named(
    server: VllmServer, llama: Scenario, path: str
) -> None:
    ask, said = GENERATING[path]

    def check(name: str | None) -> None:
        case = case_of(llama, name)
        body = {"model": name or BASE, "temperature": 0, **ask(case)}
        response = server.post(path, body)
        assert response.status_code == 200, f"{response.text}\n{server.log_tail()}"
        assert said(response.json()).split() == words(case), name
        assert response.json()["model"] == (name or BASE)

    def check_failure(name: str, status: int) -> None:
        response = server.post(path, {"model": name, **ask(case_of(llama, NAMED[0]))})
        assert response.status_code == status, f"{name}: {response.text}"
        assert name in response.text

    with ThreadPoolExecutor(16) as pool:
        failures = [pool.submit(check_failure, *of) for of in ((POISONS[path], 400), (GONE, 404))]
        answers = [pool.submit(check, name) for name in (None, *NAMED, FOUND) * 2]
        for done in (*failures, *answers):
            done.result()
    unknown = server.post(path, {"model": "nobody", **ask(case_of(llama, None))})
    assert unknown.status_code == 404, unknown.text


def test_sagemakers_route_looks_at_the_body_where_its_header_names_nobody(
    server: VllmServer, llama: Scenario
) -> None:
    def invoke(model: str, headers: dict[str, str]) -> httpx.Response:
        content = completions.body(model, case)
        return httpx.post(
            f"{server.url}/invocations", json=content, headers=headers, timeout=60, trust_env=False
        )

    one, other, _ = NAMED
    case = case_of(llama, one)
    assert completions.token_ids(invoke(one, {})) == case.expected.tokens
    assert completions.token_ids(invoke(one, {SAGEMAKER_HEADER: ""})) == case.expected.tokens
    assert completions.token_ids(invoke(other, {SAGEMAKER_HEADER: one})) == case.expected.tokens
    assert invoke("nobody", {}).status_code == 404


@pytest.mark.smoke("`vllm run-batch` and `vllm bench serve`")
def test_vllms_load_generator_gets_answers_of_all_adapters(
    server: VllmServer, llama: Scenario, tmp_path: Path
) -> None:
    """A failing request fails alone, and is counted as failed."""
    each = 2
    poison = next(iter(POISONS.values()))

    def asked() -> dict[Any, float]:
        return values(scrape(server), "vllm:lora_requests_by_adapter", "lora_name")

    before = asked()
    run(
        tmp_path / "log",
        *("bench", "serve", "--base-url", server.url, "--model", BASE),
        *("--tokenizer", str(llama.base), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", "8", "--random-output-len", "4", "--disable-tqdm"),
        *("--num-prompts", str(5 * each), "--lora-assignment", "round-robin"),
        *("--save-result", "--result-filename", str(tmp_path / "result.json")),
        *("--lora-modules", *NAMED, poison, GONE),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (3 * each, 2 * each)
    assert result["total_output_tokens"] == 4 * 3 * each
    after = asked()
    # The first is asked once more, to see whether the server is ready.
    counts = [after[name] - before.get(name, 0) for name in NAMED]
    assert sorted(counts) == [2, 2, 2] or sorted(counts) == [2, 2, 3], counts


@pytest.mark.smoke("`vllm run-batch` and `vllm bench serve`")
def test_a_batch_of_requests_is_answered_as_by_peft(llama: Scenario, tmp_path: Path) -> None:
    """Requests for an adapter that overflows or is unknown fail alone."""
    asked = [(name, case_of(llama, name)) for name in (None, *NAMED)]
    poison = poisoned(llama.adapters[NAMED[0]], tmp_path / POISON, "float32")
    lines = [
        {
            "custom_id": name or BASE,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": name or BASE,
                "messages": user(case),
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
            },
        }
        for name, case in asked
    ]
    lines += [
        {**lines[0], "custom_id": name, "body": {**lines[0]["body"], "model": name}}
        for name in (POISON, "nobody")
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(
        tmp_path / "log",
        *("run-batch", "--input-file", str(tmp_path / "in.jsonl")),
        *("--output-file", str(tmp_path / "out.jsonl"), "--model", str(llama.base)),
        *("--served-model-name", BASE, *SETTINGS),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--lora-modules", *(f"{name}={llama.adapters[name]}" for name in NAMED)),
        f"{POISON}={poison}",
        *("--multilora-usage-log", str(tmp_path / "usage.jsonl")),
    )
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = {answer["custom_id"]: answer["response"] for answer in found}
    for name in (POISON, "nobody"):
        assert answers.pop(name)["status_code"] != 200
    assert {
        name: answer["body"]["choices"][0]["message"]["content"].split()
        for name, answer in answers.items()
    } == {name or BASE: words(case) for name, case in asked}
    log = (tmp_path / "log").read_text()
    assert "No effect in vllm run-batch, which has no HTTP server: --multilora-usage-log." in log


def run(log: Path, *arguments: str) -> None:
    """A command of vLLM's."""
    with store_folder() as store, log.open("wb") as output:
        given = environment({FOLDER_VARIABLE: store})
        process = template.start_server(arguments, given, output.fileno())
        try:
            assert process.wait(300) == 0, log.read_text()[-3000:]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


QUERY, DOCUMENT = [5, 17, 120, 44], [3, 250, 61, 9, 12]
SCORING: Mapping[str, tuple[dict[str, Any], Callable[[dict[str, Any]], float]]] = {
    "/score": (
        {"queries": text(QUERY), "documents": [text(DOCUMENT)]},
        lambda body: body["data"][0]["score"],
    ),
    "/rerank": (
        {"query": text(QUERY), "documents": [text(DOCUMENT)]},
        lambda body: body["results"][0]["relevance_score"],
    ),
    "/classify": ({"input": [QUERY + DOCUMENT]}, lambda body: body["data"][0]["probs"][0]),
    "/pooling": (
        {"input": QUERY + DOCUMENT, "task": "classify"},
        lambda body: body["data"][0]["data"][0],
    ),
}


@pytest.mark.smoke("routes for scores, ranks, classes and pooled states")
def test_scores_are_pefts_for_the_adapter_that_is_named(tmp_path: Path) -> None:
    """By its own head, for those that bring one."""
    model = classifier(tmp_path, labels=1)
    names = tuple(recipe.name for recipe in SERVED_RECIPES)
    truth = {name: model.logits(name, QUERY + DOCUMENT).sigmoid().item() for name in (None, *names)}
    assert len({round(score, 3) for score in truth.values()}) == len(truth), "a mix-up would show"
    shutil.copytree(model.adapters[names[0]], model.adapters[GONE])
    with VllmServer(
        model.base,
        *("--served-model-name", BASE, "--runner", "pooling", *SETTINGS),
        *("--lora-modules", *(f"{name}={model.adapters[name]}" for name in (*names, GONE))),
        log=tmp_path / "vllm.log",
    ) as server:
        for name in names:  # two of them push the other out of host memory
            assert server.post("/classify", {"model": name, "input": [QUERY]}).is_success
        shutil.rmtree(model.adapters[GONE])
        for path, (body, score) in SCORING.items():
            for name, expected in truth.items():
                response = server.post(path, {"model": name or BASE, **body})
                assert response.status_code == 200, f"{path}: {response.text}{server.log_tail()}"
                assert score(response.json()) == pytest.approx(expected, rel=1e-3), (path, name)
            # One other adapter alone leaves it in host memory.
            for name in ("nobody", *([GONE] if len(names) > 1 else [])):
                response = server.post(path, {"model": name, **body})
                assert response.status_code == 404, f"{path} {name}: {response.text}"
