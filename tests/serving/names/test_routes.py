"""Routes over HTTP: every endpoint follows them, the answer names the adapter, files may change."""

import asyncio
import itertools
import json
import re
import runpy
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from .. import completions
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[3] / "examples"
BASE = "base"
HEADER = "x-multilora-adapter"
SOURCES = dict(
    zip(
        ("v2-stable", "v3-candidate", "support-fr", "support-de", "support-en", "medical-qa"),
        (recipe.name for recipe in LINEAR_RECIPES),
        strict=False,
    )
)
"""Which of the scenario's adapters is served under which name of the examples."""
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
PROMPT = "t5 t17 t120 t3 t44"


def routes_text(*lines: str) -> str:
    """The examples' routes, and more."""
    files = [EXAMPLES / "routing" / f"{name}.yaml" for name in ("ab", "per-language", "per-task")]
    bodies = [file.read_text().partition("routes:\n")[2] for file in files]
    return "\n".join(["routes:", *bodies, *(f"  {line}" for line in lines), ""])


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: Scenario
    routes: Path
    root: Path

    def case(self, adapter: str) -> Case:
        name = None if adapter == BASE else SOURCES[adapter]
        return self.scenario.cases_of(name)[-1]

    def post(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        url = f"{self.server.url}{path}"
        return httpx.post(url, json=body, headers=headers, timeout=60, trust_env=False)

    def complete(self, route: str, **options: Any) -> httpx.Response:
        return self.post(
            "/v1/completions", {"model": route, "prompt": PROMPT, "max_tokens": 1, **options}
        )

    def models(self) -> list[str]:
        return [model["id"] for model in self.server.get("/v1/models").json()["data"]]

    def write(self, text: str) -> None:
        """Puts a new routes file in the place of the old one, as a deployment would."""
        new = self.routes.with_suffix(".new")
        new.write_text(text)
        new.rename(self.routes)

    def put(self, source: str, folder: str) -> Path:
        shutil.rmtree(self.root / folder, ignore_errors=True)
        return Path(shutil.copytree(self.scenario.adapters[source], self.root / folder))


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("routes")
    routes = root / "routes.yaml"
    routes.write_text(routes_text())
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE, "--chat-template", CHAT),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={llama.adapters[s]}" for name, s in SOURCES.items())),
        *("--multilora-routes", str(routes)),
        log=root / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, llama, routes, root)


def until(found: Callable[[], bool], limit_s: float = 15.0) -> bool:
    """Whether something comes true in time."""
    deadline = time.monotonic() + limit_s
    while not found():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_routes_are_listed_beside_the_adapters_and_what_nobody_serves_yet_is_reported(
    deployment: Deployment,
) -> None:
    assert sorted(deployment.models()) == sorted([BASE, *SOURCES, "assistant", "support", "helper"])
    log = deployment.server.log.read_text()
    reported = (
        "route 'helper' leads to names that nobody serves yet: medical-qa-previous, legal-review"
    )
    assert reported in log


@pytest.mark.parametrize(
    ("route", "options", "adapter"),
    [
        ("helper", {"metadata": {"task": "medical"}}, "medical-qa"),
        ("helper", {"metadata": {"task": "poetry"}}, BASE),
        ("support", {"metadata": {"language": "fr"}}, "support-fr"),
        ("support", {}, "support-en"),
    ],
    ids=["case", "base-by-name", "language", "default"],
)
def test_a_route_is_answered_as_its_adapter(
    deployment: Deployment, route: str, options: dict[str, Any], adapter: str
) -> None:
    case = deployment.case(adapter)
    response = completions.ask(deployment.server, route, case, **options)
    assert response.status_code == 200, response.text
    assert completions.token_ids(response) == case.expected.tokens
    assert response.headers[HEADER] == response.json()["model"] == adapter


ENDPOINTS = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 8, "temperature": 0},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "temperature": 0,
    },
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 8, "temperature": 0, "store": False},
    "/v1/messages": {
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 8,
        "temperature": 0,
    },
    "/tokenize": {"prompt": PROMPT},
    "/detokenize": {"tokens": [5, 17, 120]},
}


def said(path: str, response: httpx.Response) -> object:
    """What an endpoint answers, without what differs from call to call."""
    assert response.status_code == 200, response.text
    body = response.json()
    if path == "/v1/completions":
        return body["choices"][0]["text"]
    if path == "/v1/chat/completions":
        return body["choices"][0]["message"]["content"]
    if path == "/v1/responses":
        return body["output"][0]["content"][0]["text"]
    if path == "/v1/messages":
        return body["content"][0]["text"]
    return body


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_endpoint_follows_routes(deployment: Deployment, path: str) -> None:
    """By a header, which says the same to all of them."""
    body = ENDPOINTS[path]
    routed = deployment.post(path, {"model": "support", **body}, {"Accept-Language": "de-AT"})
    direct = deployment.post(path, {"model": "support-de", **body})
    other = deployment.post(path, {"model": "support-fr", **body})
    assert said(path, routed) == said(path, direct)
    assert routed.headers[HEADER] == "support-de"
    assert direct.headers[HEADER] == "support-de"
    if path.startswith("/v1"):
        assert said(path, direct) != said(path, other)
        assert routed.json()["model"] == "support-de"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_streams_name_the_adapter(deployment: Deployment, path: str) -> None:
    body = {"model": "support", "stream": True, **ENDPOINTS[path]}
    response = deployment.post(path, body, {"Accept-Language": "fr"})
    assert response.headers[HEADER] == "support-fr"
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert {chunk["model"] for chunk in chunks} == {"support-fr"}


def test_a_change_of_the_file_is_in_force_without_a_restart(deployment: Deployment) -> None:
    deployment.write(routes_text("latest: v3-candidate"))
    assert deployment.complete("latest").headers[HEADER] == "v3-candidate"  # new: at once
    deployment.write(routes_text("latest: v2-stable"))
    assert until(lambda: deployment.complete("latest").headers[HEADER] == "v2-stable")
    assert "latest" in deployment.models()
    deployment.write("routes: {latest: [")
    log = deployment.server.log
    assert until(
        lambda: deployment.complete("latest").is_success and "routes stay" in log.read_text()
    )
    deployment.write(routes_text())
    assert until(lambda: deployment.complete("latest").status_code == 404)
    assert log.read_text().count("The routes stay as they were") == 1
    assert "latest" not in deployment.models()


def test_a_route_and_an_adapter_cannot_share_a_name(deployment: Deployment) -> None:
    path = deployment.put(SOURCES["support-fr"], "collision")
    body = {"lora_name": "support", "lora_path": str(path)}
    response = deployment.post("/v1/load_lora_adapter", body)
    assert response.status_code == 400
    assert "the name 'support' is a route's" in response.json()["error"]["message"]
    deployment.write("routes: {support-fr: support-de}")
    assert until(
        lambda: (
            deployment.complete("support-fr").is_success
            and "routes.support-fr: found the name of an adapter"
            in deployment.server.log.read_text()
        )
    )
    assert deployment.complete("support-fr").headers[HEADER] == "support-fr"
    deployment.write(routes_text())


def test_without_adapter_and_fallback_a_route_is_not_found(deployment: Deployment) -> None:
    deployment.write(routes_text("nowhere: nobody", "strict: {by: user, cases: {a: v2-stable}}"))
    response = deployment.complete("nowhere")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == (
        "The model `nowhere` is a route, and no adapter of it is available: there is no adapter "
        "`nobody`"
    )
    response = deployment.complete("strict", user="b")
    assert response.status_code == 400
    assert "found 'b', expected one of a" in response.json()["error"]["message"]
    deployment.write(routes_text())


def test_a_fallback_answers_while_an_adapter_cannot_be_loaded(deployment: Deployment) -> None:
    """The request that finds out fails with the reason; later ones do not."""
    deployment.write(routes_text("y: {adapter: fragile, fallback: support-de}"))
    path = deployment.put(SOURCES["support-fr"], "fragile")
    for name in SOURCES:
        deployment.complete(name)
    # Host memory is full: the adapter is checked, and stays on disk.
    body = {"lora_name": "fragile", "lora_path": str(path)}
    assert deployment.post("/v1/load_lora_adapter", body).status_code == 200
    for name in itertools.islice(SOURCES, 4):
        deployment.complete(name)
    path.rename(path.with_name("away"))
    found_out = deployment.complete("y")
    assert found_out.status_code == 404, found_out.text
    assert "fragile" in found_out.json()["error"]["message"]
    for _ in range(3):
        assert deployment.complete("y").headers[HEADER] == "support-de"
    assert deployment.complete("fragile").status_code == 404  # asked by name, never another
    path.with_name("away").rename(path)
    assert until(lambda: deployment.complete("y").headers[HEADER] == "fragile")
    deployment.post("/v1/unload_lora_adapter", {"lora_name": "fragile"})
    deployment.write(routes_text())


def test_requests_are_counted_by_route_and_adapter(deployment: Deployment) -> None:
    def count(adapter: str) -> float:
        labels = {f'lora_name="{adapter}"', 'route="support"', 'reason="chosen"'}
        lines = re.findall(
            r"^vllm:lora_route_requests_total\{(.*)\} (\S+)$",
            deployment.server.get("/metrics").text,
            re.MULTILINE,
        )
        return sum(float(value) for found, value in lines if labels <= set(found.split(",")))

    before = count("support-fr"), count("support-de")
    for language in ("fr", "fr", "de"):
        assert deployment.complete("support", metadata={"language": language}).is_success
    assert (count("support-fr"), count("support-de")) == (before[0] + 2, before[1] + 1)


SCRIPTS = {
    "ab": ([], r"v2-stable: \d+ of 100 customers\nv3-candidate: \d+ of 100 customers\n"),
    "per_language": (
        ["--language", "fr", "--language", "de-AT, en;q=0.5", "--language", "it"],
        r"fr -> support-fr: .*\nde-AT, en;q=0.5 -> support-de: .*\nit -> support-en: .*\n",
    ),
    "per_task": (
        ["--task", "medical", "--task", "poetry"],
        r"medical -> medical-qa: .*\npoetry -> base: .*\n",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_examples_run(
    deployment: Deployment,
    script: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, output = SCRIPTS[script]
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    path = EXAMPLES / "patterns" / f"{script}.py"
    arguments = ["--url", deployment.server.url, "--prompt", PROMPT, *options]
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    monkeypatch.syspath_prepend(path.parent)
    runpy.run_path(str(path), run_name="__main__")
    assert re.fullmatch(output, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("backend", "reason"), [("vllm", "own kernels"), ("native", "--multilora-max-blends 0")]
)
def test_a_route_does_without_its_blend_where_nothing_blends(
    backend: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own loader would take the blend for a folder, and end the engine."""
    pytest.importorskip("vllm")
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.server.names import registration
    from vllm_multilora.integration.server.names.routes import ServerRoutes

    blend = {"blend": {"style": 0.5, "domain": 0.5}}
    routes = {"house": {**blend, "fallback": "domain"}, "bare": blend}
    path = tmp_path / "routes.json"
    path.write_text(json.dumps({"routes": routes}))
    vllm_config = SimpleNamespace(additional_config={"multilora": {"max_blends": 0}})
    models = SimpleNamespace(
        lora_requests={name: LoRARequest(name, 1, f"/{name}") for name in ("style", "domain")},
        base_model_paths=[SimpleNamespace(name=BASE)],
        is_base_model=BASE.__eq__,
        engine_client=SimpleNamespace(vllm_config=vllm_config),
    )
    asked: list[Any] = []

    def acts_for(models: Any) -> bool:
        asked.append(models)
        return backend != "vllm"

    monkeypatch.setattr(registration, "acts_for", acts_for)
    server = ServerRoutes(models, str(path))
    assert asyncio.run(server.lead("house", {})) == "domain"
    refusal: Any = asyncio.run(server.lead("bare", {}))
    assert refusal.error.code == HTTPStatus.BAD_REQUEST
    assert reason in refusal.error.message
    assert asked == [models]  # not for each request


def test_a_new_route_is_known_while_all_of_asyncios_own_threads_are_busy(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from vllm_multilora.integration.server.names.routes import ServerRoutes

    path, held = tmp_path / "routes.json", threading.Event()
    path.write_text('{"routes": {}}')
    models = SimpleNamespace(
        lora_requests={}, base_model_paths=[SimpleNamespace(name=BASE)], is_base_model=BASE.__eq__
    )
    server = ServerRoutes(models, str(path))

    async def is_found() -> bool:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, held.wait, 60)
        path.write_text(json.dumps({"routes": {"house": BASE}}))
        await server.look_for("house")
        is_known = "house" in server
        held.set()
        await busy
        return is_known

    assert asyncio.run(is_found())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("routes: {a: {split: {b: x}}}", "line 1, routes.a.split.b: found 'x', expected a weight"),
        ("routes: {base: b}", "line 1, routes.base: found the name of the base model"),
        (None, "cannot read the routes: No such file"),
    ],
    ids=["broken", "base-name", "missing"],
)
def test_a_server_does_not_start_with_a_file_that_cannot_be_used(
    llama: Scenario, tmp_path: Path, text: str | None, message: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_multilora.documents import DocumentError

    path = tmp_path / "routes.yaml"
    if text is not None:
        path.write_text(text)
    arguments = EngineArgs(
        model=str(llama.base),
        served_model_name=[BASE],
        enable_lora=True,
        additional_config={"multilora": {"routes": str(path)}},
    )
    with pytest.raises(DocumentError) as caught:
        arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    arguments.create_engine_config(UsageContext.LLM_CLASS)  # has no use for routes
