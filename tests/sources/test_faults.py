"""A source that hangs, breaks off, lies or refuses: exact errors, and nothing half-written."""

import time
from pathlib import Path

import pytest

from tests.sources.conftest import adapter, files_in
from tests.sources.web_server import Fault, WebServer
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.protocol.messages import Failed, Loaded

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
WHOLE = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "lease"]


@pytest.fixture(params=["http", "s3"])
def engine(request, engines, web: WebServer, tmp_path: Path, monkeypatch):
    """An engine that may read from the server, and the URL of an adapter there."""
    web.put("/loras/a", adapter(tmp_path / "a"))
    if request.param == "http":
        root = f"{web.address}/loras"
    else:
        root = "s3://loras"
        monkeypatch.setenv("AWS_ENDPOINT_URL", web.address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-0123456789")
    engine = engines(root, timeout_s=20.0)
    return engine, f"{root}/a"


def test_only_the_files_that_are_read_are_fetched(engine, web, cache):
    engine, url = engine
    assert isinstance(engine.load(1, url), Loaded)
    assert files_in(cache) == WHOLE
    assert {one.path for one in web.served} == {f"/loras/a/{name}" for name in (WEIGHTS, CONFIG)}


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_a_broken_download_goes_on_where_it_was(engine, web, kind):
    engine, url = engine
    web.faults = [Fault("GET", WEIGHTS, kind, 3000)]
    assert isinstance(engine.load(1, url), Loaded)
    first, second = web.gets(WEIGHTS)
    assert (first.begin, second.begin) == (0, 3000)
    assert second.if_match is not None


def test_a_file_replaced_between_two_attempts_is_not_mixed(engine, web, tmp_path, cache):
    engine, url = engine
    web.faults = [Fault("GET", WEIGHTS, "cut", 3000), Fault("GET", WEIGHTS, "status", 503)]
    other = adapter(tmp_path / "b", seed=1) / WEIGHTS
    ticket = engine.client.request_load(_request(1, url))
    engine.until(lambda: len(web.gets(WEIGHTS)) >= 2)
    web.files[f"/loras/a/{WEIGHTS}"] = other.read_bytes()
    failed = engine.answer(ticket)
    assert isinstance(failed, Failed)
    assert failed.kind is FailureKind.UNREADABLE
    assert "replaced while it was fetched" in failed.message
    assert files_in(cache) == []
    assert isinstance(engine.load(1, url, fresh=True), Loaded)


def _request(number: int, url: str):
    from vllm_multilora.store.protocol.messages import LoadRequest

    return LoadRequest(number, "a", url)


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (Fault("HEAD", CONFIG, "status", 404, 99), FailureKind.GONE, "adapter_config.json is mis"),
        (Fault("HEAD", WEIGHTS, "status", 403, 99), FailureKind.INVALID, "403 Forbidden"),
        (Fault("GET", WEIGHTS, "status", 403, 99), FailureKind.INVALID, "read access"),
        (Fault("GET", WEIGHTS, "status", 503, 99), FailureKind.UNREADABLE, "503 Service Unav"),
        (Fault("GET", WEIGHTS, "length", 100, 99), FailureKind.UNREADABLE, ""),
        (Fault("GET", WEIGHTS, "cut", 0, 99), FailureKind.UNREADABLE, "not to be had"),
    ],
    ids=["missing", "no-listing", "no-access", "down", "longer-than-listed", "always-cut"],
)
def test_what_a_source_does_wrong_is_said(engine, web, cache, fault, kind, text):
    engine, url = engine
    web.faults = [fault]
    failed = engine.load(1, url)
    assert isinstance(failed, Failed)
    assert failed.kind is kind
    assert text in failed.message
    assert url in failed.message
    assert failed.problems[0]["file"].startswith(url)
    assert "SECRET" not in str(failed)
    assert files_in(cache) == []
    web.faults = []
    assert isinstance(engine.load(1, url, fresh=True), Loaded)


def test_others_are_served_while_a_source_hangs(engine, web, tmp_path, engines):
    engine, url = engine
    web.put("/loras/b", adapter(tmp_path / "b", seed=1))
    web.faults = [Fault("GET", f"a/{WEIGHTS}", "delay", 8)]
    hanging = engine.client.request_load(_request(1, url))
    engine.until(lambda: bool(web.gets(f"a/{WEIGHTS}")))
    begin = time.monotonic()
    assert isinstance(engine.load(2, f"{url[:-1]}b"), Loaded)
    assert time.monotonic() - begin < 6
    assert isinstance(engine.answer(hanging), Loaded)


def test_a_short_failure_of_the_source_is_not_noticed(engine, web):
    engine, url = engine
    web.faults = [Fault("HEAD", CONFIG, "status", 503, 2), Fault("GET", WEIGHTS, "status", 500, 2)]
    assert isinstance(engine.load(1, url), Loaded)


def test_requests_do_not_ask_again_for_what_has_just_failed(engine, web):
    engine, url = engine
    web.files.clear()
    assert isinstance(engine.load(1, url), Failed)
    asked = len(web.served)
    for number in range(2, 12):
        assert engine.load(number, url).kind is FailureKind.GONE
    assert len(web.served) == asked
    engine.load(20, url, fresh=True)
    assert len(web.served) > asked


def test_files_larger_than_the_model_allows_are_not_fetched(engine, web):
    engine, url = engine
    web.files[f"/loras/a/{CONFIG}"] = bytes((4 << 20) + 1)
    failed = engine.load(1, url)
    assert failed.kind is FailureKind.INVALID
    assert failed.problems[0]["code"] == "file-too-large"
    assert web.gets() == []
