"""What stands in front of several servers: vllm-router, HAProxy, and a reader of their metrics."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.clients.programs import BIN, environment, installed
from tests.clients.site import BASE, LEGAL, MEDICAL, SOURCES, Site, running_open_site
from tests.serving.models.cases import NEW_TOKENS, Scenario
from tests.serving.server import free_port

pytestmark = [pytest.mark.serving, pytest.mark.clients]

START_LIMIT_S = 60.0
ASKED = 24


@pytest.fixture(scope="module")
def other_site(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running_open_site(llama, tmp_path_factory.mktemp("other")) as running:
        yield running


@contextmanager
def running(command: list[str | Path], url: str, log: Path) -> Iterator[None]:
    """A program in front of servers, from when it has a server to ask until the block ends."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment({}), stdout=file, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + START_LIMIT_S
        while not is_up(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(30)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", trust_env=False).is_success
    except httpx.TransportError:
        return False


def ask(url: str, model: str, prompt: str, **fields: object) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60, trust_env=False)


def requests_of(site: Site) -> float:
    families = text_string_to_metric_families(site.server.get("/metrics").text)
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == "vllm:request_success_total"
    )


def assert_both_serve(url: str, sites: tuple[Site, Site]) -> None:
    """Mixed answers are PEFT's, both servers gave some of them, and a refusal is passed on."""
    before = [requests_of(site) for site in sites]
    models = [(BASE, *SOURCES)[number % 3] for number in range(ASKED)]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda model: ask(url, model, sites[0].prompt(model)), models))
    for model, answer in zip(models, answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == sites[0].expected(model), model
        if model != BASE:
            assert answer.headers["x-multilora-adapter"] == model
    served = [requests_of(site) - first for site, first in zip(sites, before, strict=True)]
    assert sum(served) == ASKED
    assert min(served) > 0
    refused = ask(url, "unknown", "t1")
    assert refused.status_code == 404
    assert "unknown" in refused.json()["error"]["message"]


@pytest.mark.proves("mixed answers of two servers are PEFT's; headers and refusals pass")
def test_vllm_router_spreads_requests_for_adapters(
    open_site: Site, other_site: Site, tmp_path: Path, tried: Callable[[str, str], None]
) -> None:
    tried("vllm-router", installed("vllm-router"))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(BIN / "vllm-router", "--host", "127.0.0.1", "--port", str(port)),
        *("--worker-urls", open_site.url, other_site.url, "--policy", "round_robin"),
        *("--prometheus-port", str(free_port())),
    ]
    with running(command, url, tmp_path / "log"):
        assert_both_serve(url, (open_site, other_site))


HAPROXY = """
global
    maxconn 64
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retries 2
    option redispatch
    retry-on conn-failure 503
frontend clients
    bind 127.0.0.1:{port}
    default_backend servers
backend servers
    balance roundrobin
    option httpchk GET /health
    server one {one} check inter 500ms
    server two {two} check inter 500ms
"""


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="HAProxy is not on the path")
@pytest.mark.proves("mixed answers of two servers are PEFT's; headers and refusals pass")
def test_haproxy_spreads_requests_for_adapters(
    open_site: Site, other_site: Site, tmp_path: Path, tried: Callable[[str, str], None]
) -> None:
    shown = subprocess.run(["haproxy", "-v"], capture_output=True, text=True, check=True).stdout
    tried("HAProxy", shown.split()[2].partition("-")[0])
    port, config = free_port(), tmp_path / "haproxy.cfg"
    one, two = (site.url.removeprefix("http://") for site in (open_site, other_site))
    config.write_text(HAPROXY.format(port=port, one=one, two=two))
    url = f"http://127.0.0.1:{port}"
    with running(["haproxy", "-db", "-f", config], url, tmp_path / "log"):
        assert_both_serve(url, (open_site, other_site))


def read_as_gie(exposition: str) -> dict[str, object]:
    """What the Gateway API inference extension reads of a server.

    Of `vllm:lora_requests_info`, the sample with the greatest value, which is a time, counts; its
    lists are split at commas.
    """
    families = {each.name: each.samples for each in text_string_to_metric_families(exposition)}
    newest = max(families["vllm:lora_requests_info"], key=lambda sample: sample.value)
    [cache] = families["vllm:cache_config_info"]

    def names(label: str) -> set[str]:
        return {each.strip() for each in newest.labels[label].split(",") if each.strip()}

    return {
        "running": names("running_lora_adapters"),
        "waiting": names("waiting_lora_adapters"),
        "max_lora": int(newest.labels["max_lora"]),
        "age_s": time.time() - newest.value,
        "queue": sum(sample.value for sample in families["vllm:num_requests_waiting"]),
        "cache_use": max(sample.value for sample in families["vllm:kv_cache_usage_perc"]),
        "block_size": int(cache.labels["block_size"]),
        "blocks": int(cache.labels["num_gpu_blocks"]),
    }


@pytest.mark.proves("its reading of `/metrics`, replayed: who runs, who waits, slots, queue, cache")
def test_gie_reads_which_adapters_run_and_wait(
    open_site: Site, tried: Callable[[str, str], None]
) -> None:
    tried("Gateway API inference extension (metrics, replay)", "")
    assert ask(open_site.url, MEDICAL, "t1").is_success
    seen: set[str] = set()
    end = time.monotonic() + 60
    with ThreadPoolExecutor(4) as threads:
        while not seen >= {MEDICAL, LEGAL}:
            assert time.monotonic() < end, seen
            asked = [
                threads.submit(ask, open_site.url, model, "t1", max_tokens=120)
                for model in (MEDICAL, LEGAL)
            ]
            while not all(each.done() for each in asked):
                read = read_as_gie(open_site.server.get("/metrics").text)
                seen |= read["running"]
                assert read["running"] | read["waiting"] <= {MEDICAL, LEGAL}
            assert all(each.result().is_success for each in asked)
    read = read_as_gie(open_site.server.get("/metrics").text)
    assert (read["max_lora"], read["block_size"]) == (2, 32)
    assert read["blocks"] > 0
    assert read["queue"] == 0
    assert 0 <= read["cache_use"] <= 1
    assert abs(read["age_s"]) < 60
