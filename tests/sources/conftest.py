"""Sources of the tests' own: a bucket (moto), a web server, a store that fetches from them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adapters.checkpoints import MODULES, layout, weights, write
from tests.sources.emulators import s3_server
from tests.sources.web_server import WebServer, web_server
from tests.store.conftest import Engine, store_folder  # noqa: F401 (a fixture)
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.store_launch import StoreProcess

RANKS = {module: 4 for module, _, _ in MODULES}
SECRET = "secret-of-the-bucket-0123456789"
KEYS = {
    "AWS_ACCESS_KEY_ID": "key-of-the-bucket",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
}


def adapter(folder: Path, seed: int = 0) -> Path:
    """Writes an adapter; another seed, other weights."""
    return write(folder, weights(RANKS, seed=seed), rank=4, alpha=6)


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as server:
        yield server


@pytest.fixture(scope="session")
def bucket_address() -> Iterator[str]:
    """The address of a real implementation of S3."""
    pytest.importorskip("moto")
    with s3_server() as address:
        yield address


class Bucket:
    """A bucket, as its owner sees it."""

    def __init__(self, address: str) -> None:
        import boto3

        self.address = address
        self._client = boto3.client(
            "s3",
            endpoint_url=address,
            region_name="us-east-1",
            aws_access_key_id="owner",
            aws_secret_access_key="owner",
        )
        self._client.create_bucket(Bucket="loras")

    def put(self, path: str, folder: Path) -> None:
        for file in folder.iterdir():
            self._client.put_object(
                Bucket="loras", Key=f"{path}/{file.name}", Body=file.read_bytes()
            )

    def remove(self, path: str) -> None:
        """Removes what lies below a path."""
        for found in self._client.list_objects_v2(Bucket="loras", Prefix=path)["Contents"]:
            self._client.delete_object(Bucket="loras", Key=found["Key"])


@pytest.fixture
def bucket(bucket_address: str, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": bucket_address}).items():
        monkeypatch.setenv(name, value)
    return Bucket(bucket_address)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def engines(cache: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines of a store that reads real files, from sources too."""
    made: list[Engine] = []

    def make(*allowed: str, server: str = "server", **settings) -> Engine:
        options = {"disk_cache": str(cache), "disk_cache_bytes": 1 << 30, "timeout_s": 60.0}
        roots = (*allowed, str(cache))
        client = StoreClient(StoreProcess(), server)
        made.append(Engine(client, [layout()], allowed_roots=roots, **(options | settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.client.close()


def files_in(cache: Path) -> list[str]:
    """The files of whole adapters in a disk cache."""
    return sorted(
        str(file.relative_to(cache / "entries")).partition("/")[2]
        for file in (cache / "entries").rglob("*")
        if file.is_file()
    )


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def children_of(pid: int) -> list[int]:
    return [int(text) for text in os.popen(f"pgrep -P {pid}").read().split()]
