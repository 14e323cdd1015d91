"""Repositories of the hub, and web servers with redirects and credentials."""

from pathlib import Path

import pytest

from tests.sources.conftest import adapter, files_in
from tests.sources.web_server import COMMIT, Fault, WebServer
from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.source_errors import SourceError
from vllm_multilora.sources.source_url import SourceUrl, allowed_source, allowed_sources
from vllm_multilora.store.protocol.messages import Loaded

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def hub(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    monkeypatch.setenv("HF_ENDPOINT", web.address)
    monkeypatch.setenv("HF_TOKEN", "token-of-the-team")
    web.put("/acme/medical", adapter(tmp_path / "a"))
    return web


def test_a_repository_is_read_at_the_commit_of_its_revision(hub, engines, cache):
    engine = engines("hf://acme")
    assert isinstance(engine.load(1, "hf://acme/medical@v2"), Loaded)
    listing, *files = [one.path for one in hub.served]
    assert listing == "/api/models/acme/medical/revision/v2"
    assert sorted(files) == [
        f"/acme/medical/resolve/{COMMIT}/adapter_config.json",
        f"/acme/medical/resolve/{COMMIT}/{WEIGHTS}",
    ]
    assert {one.authorization for one in hub.served} == {"Bearer token-of-the-team"}
    engine.load(2, f"hf://acme/medical@{COMMIT}", fresh=True)  # the same version
    assert len(files_in(cache)) == 3
    assert len(hub.gets(WEIGHTS)) == 1


def test_a_broken_download_of_a_repository_goes_on(hub, engines):
    hub.faults = [Fault("GET", WEIGHTS, "cut", 2500)]
    assert isinstance(engines("hf://acme/medical").load(1, "hf://acme/medical"), Loaded)
    assert [one.begin for one in hub.gets(WEIGHTS)] == [0, 2500]


def test_a_repository_that_does_not_exist_is_not_found(hub, engines):
    failed = engines("hf://acme").load(1, "hf://acme/unknown")
    assert failed.kind is FailureKind.GONE
    assert "hf://acme/unknown is missing" in failed.message


def test_redirects_stay_within_the_allowed_sources(web, engines, tmp_path):
    web.put("/loras/a", adapter(tmp_path / "a"))
    elsewhere = f"http://localhost:{web.port}/loras/a/{WEIGHTS}"
    engine = engines(f"{web.address}/loras")
    web.faults = [Fault("GET", WEIGHTS, "redirect", elsewhere, 99)]
    failed = engine.load(1, f"{web.address}/loras/a")
    assert failed.kind is FailureKind.INVALID
    assert "302 Found" in failed.message
    other = engines(f"{web.address}/loras", f"http://localhost:{web.port}", server="other")
    web.faults = [Fault("GET", WEIGHTS, "redirect", elsewhere)]
    assert isinstance(other.load(1, f"{web.address}/loras/a"), Loaded)


@pytest.mark.parametrize(
    ("root", "url", "is_allowed"),
    [
        ("s3://loras", "s3://loras/a", True),
        ("s3://loras/acme/", "s3://loras/acme/a/b", True),
        ("s3://loras/acme", "s3://loras/acme-2/a", False),
        ("s3://loras", "gs://loras/a", False),
        ("hf://acme", "hf://acme/medical@v1", True),
        ("hf://acme/medical@v1", "hf://acme/medical@v1", True),
        ("hf://acme/medical@v1", "hf://acme/medical@v2", False),
        ("https://HOST/a", "https://host/a/b", True),
        ("https://host/a", "http://host/a/b", False),
        ("https://host", "https://host:8443/a", False),
    ],
)
def test_a_url_is_allowed_if_it_is_a_root_or_below_one(root, url, is_allowed):
    if is_allowed:
        assert str(allowed_source(SourceUrl.parse(url), allowed_sources([root, "/folder"])))
    else:
        with pytest.raises(SourceError, match="--multilora-allowed-roots"):
            allowed_source(SourceUrl.parse(url), allowed_sources([root, "/folder"]))


@pytest.mark.parametrize(
    "text",
    [
        "s3://",
        "s3://b/a/../c",
        "s3://b//a",
        "s3://b/a?versionId=1",
        "https://host/%2e%2e/a",
        "https://host/a%2Fb",
        "https://host/a\\b",
        "hf://acme/medical@",
        "file:///a",
        "https://host/a\n",
    ],
)
def test_what_is_no_url_of_one_folder_is_refused(text):
    with pytest.raises(SourceError):
        SourceUrl.parse(text)
