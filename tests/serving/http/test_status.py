"""`GET /v1/lora_adapters` and `vllm-multilora status`: what a server says of its adapters."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_multilora.cli import main
from vllm_multilora.gateway.status.status_route import NEW_S
from vllm_multilora.store.memory.arena import PAGE

from ..completions import ask, assert_serves
from ..models.cases import Scenario
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

KEY = "secret"
COLD, WARM, HOT = "all-linear-r8", "qv-r5", "rslora-r16"


@dataclass(frozen=True)
class Served:
    server: VllmServer
    scenario: Scenario

    def adapters(self) -> dict[str, dict]:
        return {row["id"]: row for row in self.listing()["data"]}

    def listing(self) -> dict:
        time.sleep(NEW_S)  # an answer may be as old as that
        response = self.server.get("/v1/lora_adapters")
        assert response.status_code == 200, f"{response.text}\n{self.server.log_tail()}"
        return response.json()


@pytest.fixture(scope="module")
def served(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with one slot and a key; runtime updates of adapters are off."""
    folder = tmp_path_factory.mktemp("status")
    gone = folder / "gone"
    gone.symlink_to(llama.adapters[COLD])
    modules = [
        json.dumps({"name": name, "path": str(llama.adapters.get(name, gone))})
        for name in ("gone", WARM, HOT)
    ]
    with VllmServer(
        llama.base,
        *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "128", "--max-num-seqs", "4"),
        *("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
        *("--lora-modules", *modules),
        log=folder / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"},
        api_key=KEY,
    ) as server:
        gone.unlink()
        yield Served(server, llama)


def test_adapters_are_listed_with_their_places_and_their_use(served: Served) -> None:
    before = served.adapters()
    assert {name: row["state"] for name, row in before.items()} == {
        "gone": "host",
        WARM: "host",
        HOT: "absent",  # host memory has room for two
    }
    for name in (WARM, None, WARM, HOT):
        assert_serves(served.server, name or "base", served.scenario.cases_of(name)[0])
    listing = served.listing()
    assert listing["object"] == "list"
    rows = {row["id"]: row for row in listing["data"]}
    warm, hot = rows[WARM], rows[HOT]
    assert hot["object"] == "lora_adapter"
    assert (hot["state"], hot["tier"], hot["slot"]) == ("slot", "gpu", 0)
    assert (warm["state"], warm["tier"], warm["slot"]) == ("host", "cpu", None)
    assert (hot["rank"], warm["rank"]) == (16, 5)
    assert (hot["requests"], warm["requests"]) == (1, 2)
    # The slot was empty, then the adapter had it, then it went to the other.
    assert (hot["hits"], warm["hits"]) == (0, 1)
    assert hot["path"] == str(served.scenario.adapters[HOT])
    assert hot["bytes"] > warm["bytes"] > 0
    assert time.time() - 60 < warm["last_used"] < hot["last_used"] < time.time()
    assert not hot["pinned"]
    assert hot["last_error"] is None
    assert listing["slots"] == {"total": 1, "free": 0}
    memory = listing["cpu"]
    in_pages = memory.pop("bytes")
    assert 0 <= in_pages - (hot["bytes"] + warm["bytes"]) < 2 * PAGE
    assert memory == {"adapters": 2, "bytes_limit": None, "adapters_limit": 2}


def test_an_adapter_that_could_not_be_loaded_says_why(served: Served) -> None:
    case = served.scenario.cases_of(COLD)[0]
    assert ask(served.server, "gone", case).status_code == 404
    row = served.adapters()["gone"]
    assert row["state"] == "failed"
    assert row["tier"] == "disk"
    assert row["last_error"]
    assert row["requests"] == 1


def test_the_command_shows_the_same(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    arguments = ["status", "--url", served.server.url]
    assert main(arguments) == 2
    assert "--api-key" in capsys.readouterr().err
    assert main([*arguments, "--api-key", KEY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] == served.listing()["data"]
    assert main([*arguments, "--api-key", KEY]) == 0
    out = capsys.readouterr().out
    for name, row in served.adapters().items():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert line.split()[1] == row["state"]


def test_the_path_is_as_guarded_and_as_read_only_as_vllms_own(served: Served) -> None:
    path = "/v1/lora_adapters"
    stranger = httpx.get(f"{served.server.url}{path}", trust_env=False)
    assert stranger.status_code == 401
    assert served.server.post(path, {}).status_code == 405
    assert served.server.post("/v1/load_lora_adapter", {}).status_code == 404


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"openai_serving_models": SimpleNamespace(engine_client=None)},
        {
            "openai_serving_models": SimpleNamespace(
                engine_client=SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None))
            )
        },
    ],
    ids=["no models", "no engine", "LoRA is off"],
)
def test_where_the_plugin_does_not_act_there_is_no_such_path(state: dict[str, object]) -> None:
    from vllm_multilora.gateway.status.status_route import AdaptersRoute

    app = FastAPI()
    AdaptersRoute(None).add_to(app)
    for name, value in state.items():
        setattr(app.state, name, value)
    client = TestClient(app)
    found, unknown = client.get("/v1/lora_adapters"), client.get("/v1/unknown")
    assert (found.status_code, found.json()) == (unknown.status_code, unknown.json())
