"""A real server whose adapters lie in a bucket: answers, reloads and refusals."""

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import completions
from tests.serving.completions import ask
from tests.serving.conftest import (  # noqa: F401 (fixtures)
    _require_serving_stack,
    _servers_can_be_forked,
    llama,
)
from tests.serving.models.cases import Scenario
from tests.serving.server import VllmServer
from tests.sources.conftest import KEYS, SECRET, Bucket
from vllm_multilora.integration.server.names.sources.source_names import CHECK_S

pytestmark = [pytest.mark.serving, pytest.mark.slow]

SETTINGS = (
    *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--max-model-len", "128"),
    *("--max-num-seqs", "8", "--block-size", "32", "--enable-lora", "--max-loras", "2"),
    *("--max-cpu-loras", "2", "--max-lora-rank", "64"),
)


def started(base: Path, bucket: Bucket, folder: Path, *arguments: str, **env: str) -> VllmServer:
    """A server that may fetch from a part of the bucket."""
    return VllmServer(
        base,
        *SETTINGS,
        *("--multilora-allowed-roots", "s3://loras/served"),
        *("--multilora-disk-cache", str(folder / "cache"), "--multilora-disk-cache-gib", "1"),
        *arguments,
        log=folder / "vllm.log",
        env={**KEYS, "AWS_ENDPOINT_URL": bucket.address, **env},
    )


@pytest.fixture
def server(llama: Scenario, bucket: Bucket, tmp_path: Path) -> Iterator[VllmServer]:  # noqa: F811
    first = next(iter(llama.adapters))
    for name in list(llama.adapters)[:3]:
        bucket.put(f"served/{name}", llama.adapters[name])
    registered = "--lora-modules", f"{first}=s3://loras/served/{first}"
    is_on = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with started(llama.base, bucket, tmp_path, *registered, **is_on) as running:
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


def until(is_so: Callable[[], bool]) -> None:
    """Waits for a change at a URL to be noticed; what is asked must send requests."""
    deadline = time.monotonic() + 2 * CHECK_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_adapters_below_a_url_are_served_by_name_in_the_version_that_is_there(
    llama: Scenario,  # noqa: F811
    bucket: Bucket,
    tmp_path: Path,
) -> None:
    """Which takes no registration: the endpoints for that are off."""
    first, second, third = list(llama.adapters)[:3]
    case = llama.cases_of(first)[0]
    below = "--multilora-adapter-dir", "s3://loras/served/below"
    bucket.put("served/below/a", llama.adapters[first])
    with started(llama.base, bucket, tmp_path, *below) as server:
        for name in ("unknown", "a?versionId=1", "../a", "a/", ".a"):
            refused = ask(server, name, case)
            assert refused.status_code == 404, refused.text
            assert "s3://" not in refused.text
        for case in llama.cases_of(first):
            completions.assert_serves(server, "a", case)
        # One that has come since the start.
        bucket.put("served/below/b", llama.adapters[second])
        for case in llama.cases_of(second):
            completions.assert_serves(server, "b", case)
        assert {"a", "b"} <= {model["id"] for model in server.get("/v1/models").json()["data"]}

        bucket.put("served/below/a", llama.adapters[third])
        new = llama.cases_of(third)[0]
        until(lambda: completions.token_ids(ask(server, "a", new)) == new.expected.tokens)
        for case in llama.cases_of(third):
            completions.assert_serves(server, "a", case)

        # One that is no adapter leaves the version before serving; one that has gone is unloaded.
        broken = tmp_path / "broken"
        shutil.copytree(llama.adapters[second], broken)
        (broken / "adapter_config.json").write_text("{")
        bucket.put("served/below/a", broken)
        bucket.remove("served/below/b")
        until(lambda: ask(server, "b", new).status_code == 404)

        def is_refused() -> bool:
            for case in llama.cases_of(third):
                completions.assert_serves(server, "a", case)
            return "a stays as it is" in server.log.read_text()

        until(is_refused)
