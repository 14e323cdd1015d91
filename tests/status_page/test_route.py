"""`GET /multilora` without a browser: who gets the page, what goes with it, what tenants add."""

import base64
import hashlib
import json
import re
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.gateway.keys.middleware import AccessMiddleware
from vllm_multilora.gateway.status import page as status_page
from vllm_multilora.gateway.status.status_route import MAX_SHARE, AdaptersRoute, RecentListing
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.names.routes import ROUTES, ServerRoutes
from vllm_multilora.states import AdapterState
from vllm_multilora.tenants.keys import stored
from vllm_multilora.tenants.rules import STATUS, STATUS_PAGE

from .stub import listing, row

ADMIN, CLIENT, ACME = "sk-admin-0123456789", "sk-client", "sk-acme"
MAX_BYTES = 32 << 10


class Answered(RecentListing):
    """A listing that no engine has to be asked for."""

    rows = (row("acme-1", 1, "host"), row("other", 2, "slot", slot=0))

    async def get(self, asked: Any, ask: Any) -> Any:
        return listing([*self.rows])


def client(
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    access: Access | None = None,
    recent: RecentListing | None = None,
) -> TestClient:
    """A server with the routes, and with keys if it is to have any."""
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    config = SimpleNamespace(additional_config={"multilora": settings})
    models = SimpleNamespace(
        lora_requests={}, engine_client=SimpleNamespace(vllm_config=config, engine_core=None)
    )
    app = FastAPI()
    app.state.args = Namespace(enable_lora=True, additional_config=config.additional_config)
    app.state.openai_serving_models = models
    AdaptersRoute(access, recent or Answered()).add_to(app)
    status_page.add_route(app)
    if access is not None:
        app.add_middleware(AccessMiddleware, access=access)
    return TestClient(app)


@pytest.fixture
def access(tmp_path):
    """The keys of an operator, a client and a tenant."""
    path = tmp_path / "tenants.json"
    limits = {"running": 8, "tokens_per_minute": 6000}
    acme = {"keys": [stored(ACME)], "adapters": ["acme-*"], "weight": 2, "limits": limits}
    path.write_text(json.dumps({"tenants": {"acme": acme}}))
    return Access(api_keys=[CLIENT], admin_keys=[ADMIN], tenants_path=str(path))


def test_the_page_is_one_small_file_that_needs_nothing_else(monkeypatch):
    answer = client(monkeypatch, {}).get(STATUS_PAGE)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.content) < MAX_BYTES
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", answer.text)
    assert all(address.startswith("data:") for address in addresses)
    for state in AdapterState:
        assert f".{state.value} {{" in answer.text, "it has no colour"
        assert f'"{state.value}"' in answer.text


def test_the_policy_lets_the_pages_own_script_and_style_be_and_nothing_else(monkeypatch):
    answer = client(monkeypatch, {}).get(STATUS_PAGE)
    policy = dict(
        rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; ")
    )
    for tag in ("script", "style"):
        content = answer.text.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in answer.headers


def test_nothing_in_the_page_makes_elements_of_text_or_keeps_anything():
    text = status_page.page()
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
    ):
        assert way not in text
    for place in ("localStorage", "sessionStorage", "indexedDB", "document.cookie"):
        assert place not in text
    assert " style=" not in text
    assert not re.search(r"\son\w+=", text)


def test_the_page_can_be_switched_off(monkeypatch):
    server = client(monkeypatch, {"status_page": False})
    found, unknown = server.get(STATUS_PAGE), server.get("/unknown")
    assert (found.status_code, found.json()) == (unknown.status_code, unknown.json())
    assert server.get(STATUS).status_code == 200


def test_operators_are_notified_of_tenants_and_nobody_else_is(monkeypatch, access):
    server = client(monkeypatch, {}, access)

    def reported(key: str) -> dict[str, Any]:
        return server.get(STATUS, headers={"x-api-key": key}).json()

    [acme] = reported(ADMIN)["tenants"]
    limits = {name: limit for name, limit in acme.pop("limits").items() if limit is not None}
    assert limits == {"running": 8, "tokens_per_minute": 6000}
    uses = dict.fromkeys(("running", "waiting", "adapters", "tokens"), 0)
    assert acme == {"id": "acme", "object": "tenant", "weight": 2, **uses}
    assert "tenants" not in reported(CLIENT)
    assert set(reported(ACME)) == {"object", "data"}
    assert [one["id"] for one in reported(ACME)["data"]] == ["acme-1"]


def test_only_who_may_see_folders_learns_where_adapters_lie(monkeypatch, access):
    error = "/adapters/1/adapter_model.safetensors is cut off"
    rows = [row("acme-1", 1, "failed", last_error=error)]
    monkeypatch.setattr(Answered, "rows", rows)
    server = client(monkeypatch, {}, access)

    def reported(key: str) -> dict[str, Any]:
        (found,) = server.get(STATUS, headers={"x-api-key": key}).json()["data"]
        return found

    assert reported(ADMIN) == rows[0]
    for key in (CLIENT, ACME):
        assert "path" not in reported(key)
        assert "/adapters/1" not in reported(key)["last_error"]


@pytest.mark.parametrize("servers", [1, 4])
def test_all_api_servers_together_take_a_small_share_of_an_engines_time(monkeypatch, servers):
    now, asked = 0.0, []
    memory = {"adapters": 0, "bytes": 0, "bytes_limit": None, "adapters_limit": 1}
    report = {"adapters": [], "slots": {"total": 1, "free": 1}, "store": "", "cpu": memory}

    async def call(*_: Any, engine: int) -> list[dict[str, Any]]:
        asked.append(engine)
        return [{**report, "seconds": 1.0}]

    server = client(monkeypatch, {}, recent=RecentListing(lambda: now))
    models = server.app.state.openai_serving_models
    engines = SimpleNamespace(core_engines=[0, 1], _call_utility_async=call)
    models.engine_client.engine_core = engines
    models.engine_client.vllm_config.parallel_config = SimpleNamespace(_api_process_count=servers)
    tags = set()
    with server:  # one event loop for all
        for _ in range(201):
            tags.add(server.get(STATUS).headers["etag"])
            now += 1.0
    assert len(tags) == len(asked) / 2
    assert 1 < len(tags) <= 200 * MAX_SHARE / servers + 1


def test_what_tenants_use_is_counted(access):
    account = access.caller(ACME).account
    account.use("acme-1")
    account.use("acme-1")
    account.use("acme-2")
    account.charge(1500)
    (reported,) = access.tenants_now()
    assert reported["adapters"] == 2
    assert 1400 < reported["tokens"] <= 1500  # a hundred a second come again


def test_operators_see_where_routes_lead(monkeypatch, access, tmp_path):
    server, path = client(monkeypatch, {}, access), tmp_path / "routes.json"
    house = {"blend": {"style": 0.5, "acme-1": 0.5}, "fallback": "acme-1"}
    path.write_text(json.dumps({"routes": {"house": house, "latest": "other"}}))
    models = server.app.state.openai_serving_models
    models.base_model_paths, models.is_base_model = [SimpleNamespace(name="base")], "base".__eq__
    ROUTES.set(models, ServerRoutes(models, str(path)))

    def reported(key: str) -> Any:
        return server.get(STATUS, headers={"x-api-key": key}).json().get("routes")

    assert reported(ADMIN) == [
        {"id": "house", "object": "route", "leads_to": ["acme-1", "style"]},
        {"id": "latest", "object": "route", "leads_to": ["other"]},
    ]
    assert reported(CLIENT) is reported(ACME) is None


def test_without_tenants_nobody_is_notified_of_any(monkeypatch):
    access = Access(admin_keys=[ADMIN])
    answer = client(monkeypatch, {}, access).get(STATUS, headers={"x-api-key": ADMIN})
    assert answer.status_code == 200
    assert "tenants" not in answer.json()
