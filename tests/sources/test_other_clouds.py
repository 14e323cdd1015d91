"""Adapters in Google's and Azure's object stores, by what speaks their protocols here.

Google's: its XML interface is S3's, so moto answers; the emulators on package indexes lack HEAD or
`Last-Modified`, which obstore needs. Azure's: Azurite, Microsoft's own emulator.
"""

import base64
import email.utils
import hashlib
import hmac
import socket
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.programs import ENVIRONMENT
from tests.serving.server import free_port
from tests.sources.conftest import adapter, files_in
from tests.sources.emulators import put_publicly, running
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.protocol.messages import Loaded

ACCOUNT = "devstoreaccount1"  # Azurite's, whose key is in its documentation
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class Cloud:
    """A bucket.

    Attributes:
        scheme: What its URLs begin with.
        put: Stores bytes under a path.
        spoil: A variable with which nothing can be read.
        then: What kind of failure that is.
    """

    scheme: str
    put: Callable[[str, bytes], object]
    spoil: str
    then: FailureKind

    def put_adapter(self, path: str, folder: Path) -> None:
        for file in folder.iterdir():
            self.put(f"{path}/{file.name}", file.read_bytes())


@pytest.fixture
def google(bucket_address: str, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    def put(path: str, content: bytes) -> None:
        # Public, because moto does not know Google's tokens.
        put_publicly(f"{bucket_address}/google/{path}", content)

    put("", b"")
    monkeypatch.setenv("GOOGLE_BASE_URL", bucket_address)
    monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
    return Cloud("gs://google", put, "GOOGLE_BASE_URL=http://127.0.0.1:9", FailureKind.UNREADABLE)


@pytest.fixture(scope="module")
def azurite() -> Iterator[str]:
    """The address of an account in Azurite, with a container `azure`."""
    port = free_port()
    program = [ENVIRONMENT / "node/node_modules/.bin/azurite-blob", "--silent"]
    where = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    with running(
        [*program, *where, "--skipApiVersionCheck", "--disableTelemetry"],
        lambda: socket.create_connection(("127.0.0.1", port), 1).close(),
        f"{ENVIRONMENT}/bin:/usr/local/bin:/usr/bin:/bin",
    ):
        address = f"http://127.0.0.1:{port}/{ACCOUNT}"
        _make_container(address)
        yield address


def _make_container(address: str) -> None:
    """Makes the container `azure`, which obstore cannot."""
    date = email.utils.formatdate(usegmt=True)
    named = f"x-ms-date:{date}\nx-ms-version:2021-08-06"
    signed = f"PUT{chr(10) * 12}{named}\n/{ACCOUNT}/{ACCOUNT}/azure\nrestype:container"
    digest = hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)
    headers = dict(line.split(":", 1) for line in named.splitlines()) | {
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        "Content-Type": "",
    }
    request = urllib.request.Request(
        f"{address}/azure?restype=container", b"", headers, method="PUT"
    )
    urllib.request.urlopen(request, timeout=10).close()


@pytest.fixture
def azure(azurite: str, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    from obstore.store import AzureStore

    for name, value in (
        ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT),
        ("AZURE_STORAGE_ACCOUNT_KEY", KEY),
        ("AZURE_STORAGE_ENDPOINT", azurite),
    ):
        monkeypatch.setenv(name, value)
    store = AzureStore("azure", client_options={"allow_http": True})
    wrong = base64.b64encode(b"another key").decode()
    return Cloud("az://azure", store.put, f"AZURE_STORAGE_ACCOUNT_KEY={wrong}", FailureKind.INVALID)


@pytest.fixture(params=["google", pytest.param("azure", marks=pytest.mark.clients)])
def cloud(request: pytest.FixtureRequest) -> Cloud:
    found: Cloud = request.getfixturevalue(request.param)
    return found


def test_what_is_loaded_is_what_was_put_there_and_then_what_replaced_it(cloud, engines, tmp_path):
    url = f"{cloud.scheme}/acme/a"
    engine, local = engines(f"{cloud.scheme}/acme"), engines(str(tmp_path), server="other")
    for number, seed in ((1, 0), (2, 1)):
        folder = adapter(tmp_path / str(seed), seed=seed)
        cloud.put_adapter("acme/a", folder)
        loaded = engine.load(number, url, fresh=True)
        assert loaded.pack.digest == local.load(number, str(folder)).pack.digest


def test_a_missing_adapter_and_an_unreachable_cloud_give_different_errors(
    cloud, engines, tmp_path, cache
):
    cloud.put_adapter("acme/a", adapter(tmp_path / "a"))
    url, secrets = f"{cloud.scheme}/acme", tmp_path / "secrets"
    secrets.write_text("")
    engine = engines(url, source_credentials=str(secrets))
    missing = engine.load(1, f"{url}/b", fresh=True)
    assert missing.problems[0]["code"] == "file-missing"
    secrets.write_text(cloud.spoil)
    failed = engine.load(2, f"{url}/a", fresh=True)
    assert failed.kind is cloud.then
    assert KEY not in f"{missing} {failed}"
    assert files_in(cache) == []
    secrets.write_text("")
    assert isinstance(engine.load(3, f"{url}/a", fresh=True), Loaded)
