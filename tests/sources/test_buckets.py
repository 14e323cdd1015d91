"""Adapters in a bucket of a real implementation of S3: versions, sharing, secrets, crashes."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from tests.sources.conftest import (
    KEYS,
    SECRET,
    adapter,
    children_of,
    environment_of,
    files_in,
)
from tests.sources.web_server import Fault, WebServer
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.protocol.messages import Failed, Loaded, LoadRequest

URL = "s3://loras/acme/a"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def filled(bucket, tmp_path):
    """The bucket with an adapter."""
    bucket.put("acme/a", adapter(tmp_path / "a"))
    return bucket


def test_what_is_loaded_from_a_bucket_is_what_was_put_there(filled, engines, tmp_path):
    engine = engines("s3://loras/acme")
    local = engines(str(tmp_path), server="other")
    digest = engine.load(1, URL).pack.digest
    assert digest == local.load(1, str(tmp_path / "a")).pack.digest


def test_a_reload_serves_a_replaced_object_and_requests_the_registered_one(
    filled, engines, tmp_path
):
    engine = engines("s3://loras/acme", budget_adapters=1)
    first = engine.load(1, URL, fresh=True)
    engine.client.release(first.pack.pack)
    filled.put("acme/a", adapter(tmp_path / "b", seed=1))
    other = engine.load(2, URL, fresh=True)  # which takes the room of the first
    assert other.pack.digest != first.pack.digest
    engine.client.release(other.pack.pack)
    again = engine.load(1, URL)
    assert again.was_read
    assert again.pack.digest == first.pack.digest


@pytest.fixture
def another_stores_folder():
    """Not below pytest's folders: the path of a socket must be short."""
    with tempfile.TemporaryDirectory(prefix="multilora-store-", ignore_cleanup_errors=True) as path:
        yield path


def test_two_stores_and_many_requests_download_once(
    filled, engines, cache, monkeypatch, another_stores_folder
):
    with_others = [engines("s3://loras/acme", server=f"s{i}") for i in range(2)]
    monkeypatch.setenv("MULTILORA_STORE_FOLDER", another_stores_folder)
    with_others.append(engines("s3://loras/acme", server="s2"))
    assert len({engine.store().pid for engine in with_others}) == 2
    tickets = [
        (engine, engine.client.request_load(LoadRequest(number, "a", URL, fresh=number > 3)))
        for engine in with_others
        for number in range(1, 6)
    ]
    answers = [engine.answer(ticket) for engine, ticket in tickets]
    assert all(isinstance(answer, Loaded) for answer in answers), answers
    assert len({answer.pack.digest for answer in answers}) == 1
    assert len(list((cache / "entries").iterdir())) == 1
    assert list((cache / "incoming").iterdir()) == []


def test_credentials_are_in_the_fetching_child_alone(
    web: WebServer, engines, tmp_path, monkeypatch
):
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": web.address}).items():
        monkeypatch.setenv(name, value)
    web.put("/loras/acme/a", adapter(tmp_path / "a"))
    web.faults = [Fault("GET", WEIGHTS, "delay", 2), Fault("GET", WEIGHTS, "status", 403, 99)]
    engine = engines("s3://loras/acme")
    store = engine.store().pid
    ticket = engine.client.request_load(LoadRequest(1, "a", URL))
    engine.until(lambda: bool(web.gets(WEIGHTS)))
    (child,) = children_of(store)
    if os.geteuid() == 0:  # nobody else may look
        assert SECRET.encode() not in environment_of(child)
    assert SECRET.encode() not in environment_of(store)
    assert KEYS["AWS_ACCESS_KEY_ID"] in str(web.served[-1].authorization)
    assert isinstance(engine.answer(ticket), Loaded)
    failed = engine.load(2, URL.replace("/a", "/b"), fresh=True)
    assert isinstance(failed, Failed)
    log = "".join(file.read_text() for file in (tmp_path / "store").glob("*.log"))
    for secret in KEYS.values():
        assert secret == "us-east-1" or secret not in log + str(failed)


def test_a_file_of_credentials_counts_for_more_and_is_read_anew(
    web: WebServer, engines, tmp_path, monkeypatch
):
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": web.address}).items():
        monkeypatch.setenv(name, value)
    web.put("/loras/acme/a", adapter(tmp_path / "a"))
    secrets = tmp_path / "secrets"
    secrets.write_text("# of the team\nexport AWS_ACCESS_KEY_ID='first-key'\n")
    engine = engines("s3://loras/acme", source_credentials=str(secrets))
    engine.load(1, URL, fresh=True)
    assert "first-key" in str(web.served[-1].authorization)
    secrets.write_text("AWS_ACCESS_KEY_ID=second-key\n")
    engine.load(2, URL, fresh=True)
    assert "second-key" in str(web.served[-1].authorization)
    secrets.write_text("secret without a name")
    failed = engine.load(3, URL, fresh=True)
    assert failed.kind is FailureKind.UNREADABLE
    assert "--multilora-source-credentials" in failed.message
    assert "without a name" not in failed.message


def test_a_killed_fetch_leaves_nothing_half_written_and_is_resumed(
    web: WebServer, engines, tmp_path, monkeypatch, cache
):
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": web.address}).items():
        monkeypatch.setenv(name, value)
    web.put("/loras/acme/a", adapter(tmp_path / "a"))
    weights = web.files[f"/loras/acme/a/{WEIGHTS}"]
    web.faults = [Fault("GET", WEIGHTS, "stall", 2000)]
    engine = engines("s3://loras/acme")
    store = engine.store().pid
    ticket = engine.client.request_load(LoadRequest(1, "a", URL))
    partial = cache / "incoming"
    engine.until(lambda: any(f.stat().st_size >= 2000 for f in partial.rglob(WEIGHTS)))
    (child,) = children_of(store)
    os.kill(child, signal.SIGKILL)
    failed = engine.answer(ticket)
    assert failed.kind is FailureKind.UNREADABLE
    assert files_in(cache) == []
    assert isinstance(engine.load(1, URL, fresh=True), Loaded)
    assert web.gets(WEIGHTS)[-1].begin == 2000
    (kept,) = (cache / "entries").rglob(WEIGHTS)
    assert kept.read_bytes() == weights


def test_what_nobody_waits_for_any_more_is_not_fetched(web: WebServer, engines, tmp_path, cache):
    web.put("/loras/a", adapter(tmp_path / "a"))
    web.faults = [Fault("GET", WEIGHTS, "stall", 2000, 2)]
    engine = engines(f"{web.address}/loras")
    store = engine.store().pid
    ticket = engine.client.request_load(LoadRequest(1, "a", f"{web.address}/loras/a"))
    engine.until(lambda: bool(web.gets(WEIGHTS)))
    engine.client.cancel(ticket)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(store)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ticket = engine.client.request_load(LoadRequest(2, "a", f"{web.address}/loras/a"))
    engine.until(lambda: len(web.gets(WEIGHTS)) == 2)
    engine.client.forget(2)
    assert engine.answer(ticket).kind is FailureKind.GONE
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://other/acme/a", "--multilora-allowed-roots s3://other/acme/"),
        ("s3://loras/other/a", "outside the sources"),
        ("s3://loras/acme/../other/a", "a part '..'"),
        ("https://key:secret@host/a", "a user or a password"),
        ("ftp://host/a", "the scheme 'ftp'"),
    ],
)
def test_what_no_allowed_root_names_is_refused_with_what_to_do(engines, url, text):
    failed = engines("s3://loras/acme").load(1, url)
    assert isinstance(failed, Failed)
    assert text in failed.message
    assert "key:secret" not in failed.message


def test_without_a_source_among_the_roots_no_url_is_fetched(engines, tmp_path):
    failed = engines(str(tmp_path)).load(1, URL)
    assert failed.problems[0]["code"] == "not-allowed"
