"""Blends on a server: asked for, refused, routed, reloaded, unloaded, counted, and flooded with."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.tenant_server import KEYS, write_tenants
from vllm_multilora.adapters.blend import Blend, BlendPart

from .. import completions
from ..metered import LIMIT_S, logged
from ..models.blend_models import BLENDS, PARTS, BlendScenario
from ..models.cases import Case
from ..models.recipes import AdapterRecipe
from ..models.tiny_adapters import write_adapter
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

BASE = "base"
LIMIT = 4
ACTIVATED = AdapterRecipe("activated", invocation=(250, 17))
LARGE = AdapterRecipe("large", rank=48)
HEAD = AdapterRecipe("head", targets=("q_proj", "lm_head"))
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
ROUTES = {
    "mixed": {"blend": dict(BLENDS["two"]), "fallback": BASE},
    "late-mix": {"blend": {"all-linear-r8": 1, "late": 1}, "fallback": "qv-r5"},
}
TENANTS = {
    "acme": {"adapters": ["all-linear-r8", "qv-r5"]},
    "zen": {"adapters": ["qv-r5"], "routes": ["mixed"]},
}


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: BlendScenario
    root: Path

    def request(
        self, method: str, path: str, body: Any = None, who: str = "admin"
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEYS[who]}"}
        url = f"{self.server.url}{path}"
        return httpx.request(method, url, json=body, headers=headers, timeout=120, trust_env=False)

    def ask(self, case: Case, blend: Any, who: str = "admin", **options: Any) -> httpx.Response:
        body = completions.body(BASE, case, lora_blend=blend, **options)
        return self.request("POST", "/v1/completions", body, who)

    def load(self, name: str, folder: Path, **options: Any) -> None:
        body = {"lora_name": name, "lora_path": str(folder), **options}
        answer = self.request("POST", "/v1/load_lora_adapter", body)
        assert answer.status_code == 200, answer.text

    def unload(self, name: str) -> None:
        answer = self.request("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        assert answer.status_code == 200, answer.text

    def rows(self, who: str = "admin") -> list[dict[str, Any]]:
        time.sleep(1.1)  # an answer is given again for a second
        return self.request("GET", "/v1/lora_adapters", who=who).json()["data"]

    def digest(self, name: str) -> str:
        cards = self.request("GET", "/v1/models").json()["data"]
        return next(card["digest"] for card in cards if card["id"] == name)

    def usage(self) -> list[dict[str, Any]]:
        return logged(self.root / "usage.jsonl")

    def line_of(self, adapter: str, after: int) -> dict[str, Any]:
        """What the log says last of an adapter after so many lines: it does after the answer."""
        deadline = time.monotonic() + LIMIT_S
        while not (found := [line for line in self.usage()[after:] if line["adapter"] == adapter]):
            assert time.monotonic() < deadline, self.usage()[after:]
            time.sleep(0.1)
        return found[-1]


@pytest.fixture(scope="module")
def deployment(
    blends: BlendScenario, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("deployed")
    (root / "routes.json").write_text(json.dumps({"routes": ROUTES}))
    (root / "admin.key").write_text(str(KEYS["admin"]))
    write_tenants(root / "tenants.json", TENANTS)
    others = {
        recipe.name: write_adapter(blends.base, root / recipe.name, recipe, seed=9)
        for recipe in (ACTIVATED, LARGE, HEAD)
    }
    modules = {**blends.adapters, **others}
    with VllmServer(
        blends.base,
        *("--served-model-name", BASE, "--chat-template", CHAT),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "6", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in modules.items())),
        *("--multilora-routes", str(root / "routes.json")),
        *("--multilora-admin-key-file", str(root / "admin.key")),
        *("--multilora-tenants", str(root / "tenants.json")),
        *("--multilora-usage-log", str(root / "usage.jsonl")),
        *("--multilora-max-blends", str(LIMIT)),
        log=root / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, blends, root)


def name_of(weights: dict[str, float]) -> str:
    return Blend.of(BlendPart(1, name, "/", weight) for name, weight in weights.items()).name


@pytest.mark.parametrize("name", BLENDS)
def test_answers_are_pefts_and_say_what_has_made_them(deployment: Deployment, name: str) -> None:
    weights, before = dict(BLENDS[name]), len(deployment.usage())
    for case in deployment.scenario.cases_of(name):
        response = deployment.ask(case, weights)
        assert response.status_code == 200, response.text
        assert completions.token_ids(response) == case.expected.tokens
    found = response.json()
    parts = [BlendPart(1, part, "/", weight) for part, weight in weights.items()]
    digests = [deployment.digest(part) for part in sorted(weights)]
    version = Blend.of(parts).digest(digests)[:16]
    assert response.headers["x-multilora-adapter"] == found["model"] == name_of(weights)
    assert response.headers["x-multilora-version"] == version
    assert found["multilora"] == {"adapter": name_of(weights), "version": version}
    assert deployment.line_of(name_of(weights), before)["version"][:16] == version


MESSAGES = [{"role": "user", "content": "t5 t17 t120"}]
BODIES: dict[str, tuple[dict[str, Any], str | None]] = {
    "/v1/completions": ({"prompt": "t5 t17 t120", "max_tokens": 4}, "-0"),
    "/v1/chat/completions": ({"messages": MESSAGES, "max_tokens": 4}, ""),
    "/v1/responses": ({"input": "t5 t17 t120", "max_output_tokens": 4, "store": False}, "_0"),
    "/invocations": ({"messages": MESSAGES, "max_tokens": 4}, ""),
    "/v1/chat/completions/batch": ({"messages": [MESSAGES], "max_tokens": 4}, "_0"),
    "/generative_scoring": ({"query": "t5", "items": ["t17"], "label_token_ids": [7, 8]}, "-0"),
    "/tokenize": ({"prompt": "t5 t17 t120"}, None),
}
"""Bodies, and what the log puts after the `id` of the answer; None where nothing is metered."""
STREAMS = [*BODIES][:4]
"""The ones whose answers may be streams."""


@pytest.mark.parametrize(
    ("path", "stream"),
    [*((path, False) for path in BODIES), *((path, True) for path in STREAMS)],
)
def test_endpoints_take_blends(deployment: Deployment, path: str, stream: bool) -> None:
    weights, (asked, ending) = dict(BLENDS["three"]), BODIES[path]
    body = {"model": BASE, "lora_blend": weights, **({"stream": True} if stream else {}), **asked}
    before = len(deployment.usage())
    response = deployment.request("POST", path, body)
    assert response.status_code == 200, response.text
    assert response.headers["x-multilora-adapter"] == name_of(weights)
    if path in STREAMS:
        assert len(response.headers["x-multilora-version"]) == 16
    if ending is not None:
        line = deployment.line_of(name_of(weights), before)
        assert stream or line["request_id"] == response.json()["id"] + ending


BAD: dict[str, tuple[Any, int, str]] = {
    "text": ("style", 400, "lora_blend: found 'style', expected a weight for each adapter"),
    "false": (False, 400, "lora_blend: found False, expected a weight for each adapter"),
    "empty": ({}, 400, "lora_blend: found 0 adapters, expected 1 to 8"),
    "nan": ({"qv-r5": float("nan")}, 400, "found nan for 'qv-r5', expected a weight"),
    "unknown": ({"qv-r5": 1, "nobody": 1}, 404, "The model `nobody` does not exist."),
    "path": ({"../qv-r5": 1}, 404, "There is no adapter of the name '../qv-r5'"),
    "base-model": ({"qv-r5": 1, BASE: 1}, 400, f"found the base model `{BASE}`, expected adapters"),
    "route": ({"mixed": 1}, 400, "found the route `mixed`, expected adapters"),
    "rank": (
        {"large": 1, "rslora-r16": 1, "qv-r5": 1},
        400,
        "its rank is 48 (large) + 5 (qv-r5) + 16 (rslora-r16) = 69 in ",
    ),
    "activated": (
        {"activated": 1, "qv-r5": 1},
        400,
        "activated/adapter_config.json: alora_invocation_tokens is [250, 17], expected unset in a "
        "part of a blend; an activated adapter acts on a part of the prompt only: ask for "
        "'activated' by itself",
    ),
    "head": ({"head": 1, "qv-r5": 1}, 400, "expected linear layers only in a part of a blend"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_blend_is_refused_exactly(deployment: Deployment, name: str) -> None:
    blend, status, message = BAD[name]
    case = deployment.scenario.cases_of(None)[0]
    body = json.dumps(completions.body(BASE, case, lora_blend=blend))  # NaN and Infinity, too
    headers = {"authorization": f"Bearer {KEYS['admin']}", "content-type": "application/json"}
    url = f"{deployment.server.url}/v1/completions"
    response = httpx.post(url, content=body, headers=headers, timeout=60, trust_env=False)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == status
    assert message in error["message"]
    assert str(deployment.root) not in response.text


def test_an_endpoint_that_does_not_know_the_field_takes_it_too(deployment: Deployment) -> None:
    body = {"messages": [{"role": "user", "content": "t5"}], "max_tokens": 4}
    asked = {"model": BASE, "lora_blend": {"qv-r5": 1}, **body}
    response = deployment.request("POST", "/v1/messages", asked)
    assert response.status_code == 200, response.text
    assert response.headers["x-multilora-adapter"] == name_of({"qv-r5": 1})
    assert response.json()["model"] == name_of({"qv-r5": 1})
    routed = deployment.request("POST", "/v1/messages", {"model": "mixed", **body})
    assert routed.headers["x-multilora-adapter"] == name_of(dict(BLENDS["two"]))


@pytest.mark.parametrize("model", ["qv-r5", "mixed", "nobody"])
def test_a_blend_goes_with_the_base_model_only(deployment: Deployment, model: str) -> None:
    case = deployment.scenario.cases_of(None)[0]
    body = completions.body(model, case, lora_blend={"qv-r5": 1})
    response = deployment.request("POST", "/v1/completions", body)
    assert response.status_code == 400
    found = response.json()["error"]["message"]
    assert f"found the model `{model}`, expected `{BASE}`" in found


def test_no_blend_is_none(deployment: Deployment) -> None:
    case = deployment.scenario.cases_of(None)[0]
    assert completions.token_ids(deployment.ask(case, None)) == case.expected.tokens


def test_a_route_leads_to_a_blend_and_away_from_one_that_lacks_a_part(
    deployment: Deployment,
) -> None:
    case = deployment.scenario.cases_of("two")[0]
    body = completions.body("mixed", case)
    response = deployment.request("POST", "/v1/completions", body)
    assert completions.token_ids(response) == case.expected.tokens
    assert response.headers["x-multilora-adapter"] == name_of(dict(BLENDS["two"]))
    plain = deployment.scenario.cases_of("qv-r5")[0]
    late = completions.body("late-mix", plain)
    response = deployment.request("POST", "/v1/completions", late)
    assert completions.token_ids(response) == plain.expected.tokens
    assert response.headers["x-multilora-adapter"] == "qv-r5"
    deployment.load("late", deployment.scenario.adapters["patterns"])
    response = deployment.request("POST", "/v1/completions", late)
    assert response.headers["x-multilora-adapter"] == "1*all-linear-r8+1*late"
    deployment.unload("late")
    response = deployment.request("POST", "/v1/completions", late)
    assert response.headers["x-multilora-adapter"] == "qv-r5"


def test_a_route_falls_back_from_a_blend_that_cannot_be_made(deployment: Deployment) -> None:
    """Each of its parts can be served, and they have too many ranks together."""
    deployment.load("late", deployment.scenario.adapters["rslora-r16"])
    folder = write_adapter(
        deployment.scenario.base, deployment.root / "too-large", AdapterRecipe("x", rank=60), seed=3
    )
    deployment.load("late", folder, load_inplace=True)
    plain = deployment.scenario.cases_of("qv-r5")[0]
    body = completions.body("late-mix", plain)
    found_out = deployment.request("POST", "/v1/completions", body)
    assert found_out.status_code == 400, found_out.text
    assert "8 (all-linear-r8) + 60 (late) = 68" in found_out.json()["error"]["message"]
    response = deployment.request("POST", "/v1/completions", body)
    assert response.headers["x-multilora-adapter"] == "qv-r5"
    deployment.unload("late")


def test_a_new_version_of_a_part_is_in_the_next_blend(deployment: Deployment) -> None:
    folder = deployment.root / "reloaded"
    shutil.copytree(deployment.scenario.adapters["all-linear-r8"], folder)
    deployment.load("reloaded", folder)
    two = deployment.scenario.cases_of("two")[0]
    weights = {"reloaded": 0.7, "qv-r5": 0.5}
    before = deployment.ask(two, weights)
    assert completions.token_ids(before) == two.expected.tokens
    shutil.copytree(deployment.scenario.adapters["rslora-r16"], folder, dirs_exist_ok=True)
    deployment.load("reloaded", folder, load_inplace=True)
    after = deployment.ask(two, weights)
    same = deployment.ask(two, {"rslora-r16": 0.7, "qv-r5": 0.5})
    assert completions.token_ids(after) == completions.token_ids(same)
    assert completions.token_ids(after) != two.expected.tokens
    versions = {a.headers["x-multilora-version"] for a in (before, after)}
    assert len(versions) == 2
    deployment.unload("reloaded")
    gone = deployment.ask(two, weights)
    assert gone.status_code == 404
    assert gone.json()["error"]["message"].startswith("The model `reloaded` does not exist.")
    # That of the version before, too, when requests on their way have had time to arrive.
    deadline = time.monotonic() + 30
    while any("reloaded" in (row["parts"] or ()) for row in deployment.rows()):
        assert time.monotonic() < deadline


def test_a_tenant_blends_what_it_may_use(deployment: Deployment) -> None:
    case = deployment.scenario.cases_of("two")[0]
    weights = dict(BLENDS["two"])
    allowed = deployment.ask(case, weights, who="acme")
    assert completions.token_ids(allowed) == case.expected.tokens
    refused = deployment.ask(case, weights, who="zen")
    assert refused.status_code == 404
    assert refused.json()["error"]["message"].startswith("The model `all-linear-r8` does not exist")
    # The operator says by a route that it may have this one.
    routed = deployment.request("POST", "/v1/completions", completions.body("mixed", case), "zen")
    assert completions.token_ids(routed) == case.expected.tokens
    listed = {who: {row["id"] for row in deployment.rows(who)} for who in TENANTS}
    assert name_of(weights) in listed["acme"]
    assert listed["zen"] == {"qv-r5"}
    (row,) = (row for row in deployment.rows() if row["id"] == name_of(weights))
    assert (row["kind"], row["parts"], row["path"]) == ("blend", weights, None)
    assert row["rank"] == 13
    assert row["digest"][:16] == routed.headers["x-multilora-version"]


def test_a_flood_of_blends_hurts_nobody(deployment: Deployment) -> None:
    """Many different ones, many of them at once; others' requests are served beside them."""
    flood = deployment.scenario.cases_of(None)[0]
    others = list(
        itertools.chain.from_iterable(deployment.scenario.cases_of(recipe.name) for recipe in PARTS)
    )

    def weigh(number: int) -> int:
        answer = deployment.ask(flood, {"qv-r5": 1 + number / 1000}, max_tokens=2)
        if answer.status_code == 503:
            assert f"blends in use at a time ({LIMIT}, " in answer.json()["error"]["message"]
        return answer.status_code

    def serve(case: Case) -> bool:
        body = completions.body(str(case.adapter), case)
        answer = deployment.request("POST", "/v1/completions", body)
        return completions.token_ids(answer) == case.expected.tokens

    with ThreadPoolExecutor(16) as pool:
        statuses = [pool.submit(weigh, number) for number in range(80)]
        served = [pool.submit(serve, case) for case in others]
        assert all(future.result() for future in served)
        found = {future.result() for future in statuses}
    assert 200 in found
    assert found <= {200, 503}
    assert sum(list(row["parts"] or ()) == ["qv-r5"] for row in deployment.rows()) <= LIMIT
    case = deployment.scenario.cases_of("three")[0]
    answer = deployment.ask(case, dict(BLENDS["three"]))
    assert completions.token_ids(answer) == case.expected.tokens
    exposed = deployment.request("GET", "/metrics").text
    assert 'lora_name="__blends__"' in exposed
    assert "1.001*qv-r5" not in exposed
