"""What engines and the API server tell of adapters, put together."""

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_multilora.gateway.status.status_route import AdaptersRoute, listing


def report(*, store: str = "unix:/run/store", requests: int = 5, **fields: object) -> dict:
    """What an engine with one adapter and four slots says."""
    row = {
        "int_id": 7,
        "requests": requests,
        "name": "acme",
        "path": "/adapters/acme",
        "state": "host",
        "slot": None,
        "kind": "lora",
        "parts": None,
        "rank": 8,
        "digest": "d1",
        "loaded": 40.0,
        "bytes": 100,
        "pinned": False,
        "hits": 2,
        "loads": 1,
        "last_used": 50.0,
        "last_error": None,
        **fields,
    }
    return {
        "adapters": [row],
        "slots": {"total": 4, "free": 3},
        "store": store,
        "cpu": {"adapters": 1, "bytes": 4096, "bytes_limit": 8192, "adapters_limit": None},
    }


ACME = SimpleNamespace(lora_int_id=7, lora_name="acme", lora_path="/adapters/acme")


def test_one_engine_lists_its_adapters_without_engines():
    reported = report(state="slot", slot=1)
    found = listing([reported], [ACME])
    [row] = found["data"]
    facts = {key: value for key, value in reported["adapters"][0].items() if key != "name"}
    assert row == facts | {"id": "acme", "object": "lora_adapter", "tier": "gpu"}
    assert (found["slots"], found["cpu"]) == (reported["slots"], reported["cpu"])


def test_several_engines_add_up_and_say_what_each_has():
    nearest = report(state="slot", slot=2, requests=1, digest="d2")
    found = listing([report(last_used=60.0), nearest], [ACME])
    [row] = found["data"]
    assert (row["state"], row["slot"], row["requests"], row["hits"]) == ("slot", 2, 6, 4)
    assert row["last_used"] == 60.0
    assert row["engines"] == [
        {"engine": 0, "state": "host", "slot": None, "digest": "d1"},
        {"engine": 1, "state": "slot", "slot": 2, "digest": "d2"},
    ]
    assert row["digest"] == "d2"
    assert found["slots"] == {"total": 8, "free": 6}


@pytest.mark.parametrize(
    ("stores", "copies"),
    [(("unix:/a", "unix:/a"), 1), (("unix:/a", "tcp:elsewhere"), 2)],
    ids=["one machine", "two machines"],
)
def test_host_memory_counts_once_for_each_store(stores: tuple[str, str], copies: int):
    found = listing([report(store=store) for store in stores], [ACME])
    assert found["data"][0]["bytes"] == copies * 100
    assert found["cpu"] == {
        "adapters": copies,
        "bytes": copies * 4096,
        "bytes_limit": copies * 8192,
        "adapters_limit": None,
    }


@pytest.mark.parametrize(
    ("states", "shown"),
    [
        (("absent", "failed"), "absent"),
        (("failed", "queued"), "queued"),
        (("queued", "reading"), "reading"),
        (("host", "reading"), "host"),
    ],
)
def test_an_adapter_is_as_near_as_its_nearest_engine(states: tuple[str, str], shown: str):
    [row] = listing([report(state=state) for state in states], [ACME])["data"]
    assert row["state"] == shown


@pytest.mark.parametrize(("state", "shown"), [("absent", "failed"), ("slot", "slot")])
def test_what_the_server_has_refused_has_failed_unless_an_older_version_serves(state, shown):
    [row] = listing([report(state=state)], [ACME], {7: "r is 128", 8: "another"})["data"]
    assert (row["state"], row["last_error"]) == (shown, "r is 128")


def test_an_error_is_reported_whichever_engine_had_it():
    failed = report(state="failed", last_error="the disk is gone")
    [row] = listing([report(), failed], [ACME])["data"]
    assert (row["state"], row["last_error"]) == ("host", "the disk is gone")


def test_names_that_no_engine_knows_are_absent():
    other = SimpleNamespace(lora_int_id=8, lora_name="zeta", lora_path="/adapters/zeta")
    acme, zeta = listing([report()], [other, ACME])["data"]
    assert acme["id"] == "acme"
    assert (zeta["id"], zeta["state"], zeta["tier"]) == ("zeta", "absent", "disk")
    assert (zeta["rank"], zeta["bytes"]) == (None, 0)


def test_an_adapter_that_a_request_brought_along_is_listed_and_an_old_version_is_not():
    assert [row["int_id"] for row in listing([report()], [])["data"]] == [7]
    newer = SimpleNamespace(lora_int_id=9, lora_name="acme", lora_path="/adapters/acme")
    assert [row["int_id"] for row in listing([report()], [newer])["data"]] == [9]


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
    app = FastAPI()
    AdaptersRoute(None).add_to(app)
    for name, value in state.items():
        setattr(app.state, name, value)
    client = TestClient(app)
    found, unknown = client.get("/v1/lora_adapters"), client.get("/v1/unknown")
    assert (found.status_code, found.json()) == (unknown.status_code, unknown.json())
