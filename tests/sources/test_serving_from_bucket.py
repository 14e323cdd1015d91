"""A real server whose adapters lie in a bucket: answers, reloads and refusals."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import completions
from tests.serving.conftest import (  # noqa: F401 (fixtures)
    _require_serving_stack,
    _servers_can_be_forked,
    llama,
)
from tests.serving.models.cases import Scenario
from tests.serving.server import VllmServer
from tests.sources.conftest import KEYS, SECRET, Bucket

pytestmark = [pytest.mark.serving, pytest.mark.slow]

SETTINGS = (
    *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--max-model-len", "128"),
    *("--max-num-seqs", "8", "--block-size", "32", "--enable-lora", "--max-loras", "2"),
    *("--max-cpu-loras", "2", "--max-lora-rank", "64"),
)


@pytest.fixture
def server(llama: Scenario, bucket: Bucket, tmp_path: Path) -> Iterator[VllmServer]:  # noqa: F811
    first = next(iter(llama.adapters))
    for name in list(llama.adapters)[:3]:
        bucket.put(f"served/{name}", llama.adapters[name])
    with VllmServer(
        llama.base,
        *SETTINGS,
        *("--multilora-allowed-roots", "s3://loras/served"),
        *("--multilora-disk-cache", str(tmp_path / "cache"), "--multilora-disk-cache-gib", "1"),
        *("--lora-modules", f"{first}=s3://loras/served/{first}"),
        log=tmp_path / "vllm.log",
        env={
            **KEYS,
            "AWS_ENDPOINT_URL": bucket.address,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        },
    ) as running:
        yield running


def load(server: VllmServer, name: str, url: str, *, again: bool = False) -> httpx.Response:
    body = {"lora_name": name, "lora_path": url, "load_inplace": again}
    return server.post("/v1/load_lora_adapter", body)


def test_adapters_of_a_bucket_are_served_and_reloaded(
    server: VllmServer,
    llama: Scenario,  # noqa: F811
    bucket: Bucket,
) -> None:
    first, second, third = list(llama.adapters)[:3]
    for case in llama.cases_of(first):
        completions.assert_serves(server, first, case)
    assert load(server, "b", f"s3://loras/served/{second}").is_success
    for case in llama.cases_of(second):
        completions.assert_serves(server, "b", case)
    bucket.put(f"served/{second}", llama.adapters[third])
    for case in llama.cases_of(second):
        completions.assert_serves(server, "b", case)
    assert load(server, "b", f"s3://loras/served/{second}", again=True).is_success
    for case in llama.cases_of(third):
        completions.assert_serves(server, "b", case)
    for url, status, text in (
        ("s3://loras/served/nobody", 404, "adapter_config.json is missing"),
        ("s3://others/a", 403, "--multilora-allowed-roots s3://others/"),
        (str(llama.adapters[first]), 403, "outside the folders"),
    ):
        refused = load(server, "c", url)
        assert (refused.status_code, text in refused.text) == (status, True), refused.text
    assert SECRET not in server.log.read_text()
