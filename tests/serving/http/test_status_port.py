"""The port of an engine's own, for engines that no HTTP server of vLLM's serves."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from vllm.lora.request import LoRARequest

from vllm_multilora.cli import main

from ..engine import running_engine
from ..models.cases import Scenario
from ..server import free_port

if TYPE_CHECKING:
    from vllm import LLM

pytestmark = pytest.mark.serving

PROMPT = {"prompt_token_ids": [7, 21, 88, 140, 3]}


@dataclass(frozen=True)
class Deployment:
    llm: "LLM"
    url: str

    def ask(self, *adapters: LoRARequest) -> None:
        from vllm import SamplingParams

        limit = SamplingParams(max_tokens=2)
        prompts = [PROMPT] * len(adapters)
        self.llm.generate(prompts, limit, lora_request=list(adapters), use_tqdm=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, trust_env=False)


@pytest.fixture(scope="module", params=[False, True], ids=["own process", "in this process"])
def deployment(llama: Scenario, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    port = free_port()
    settings = {"multilora": {"status_port": str(port)}}
    with running_engine(llama.base, in_process=request.param, additional_config=settings) as llm:
        yield Deployment(llm, f"http://127.0.0.1:{port}")


def adapters_of(llama: Scenario) -> list[LoRARequest]:
    names = sorted(llama.adapters)[:2]
    return [LoRARequest(name, i + 1, str(llama.adapters[name])) for i, name in enumerate(names)]


def test_adapters_and_their_metrics_are_shown(
    deployment: Deployment, llama: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = adapters_of(llama)
    deployment.ask(*adapters, adapters[0])
    listing = deployment.get("/v1/lora_adapters").json()
    found = {row["id"]: (row["state"], row["tier"], row["path"]) for row in listing["data"]}
    assert found == {each.lora_name: ("slot", "gpu", each.lora_path) for each in adapters}
    assert listing["slots"] == {"total": 4, "free": 2}

    metrics = deployment.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    families = {f.name: f for f in text_string_to_metric_families(metrics.text)}
    loads = families["vllm:lora_adapter_load"].samples
    assert {sample.labels["engine"] for sample in loads} == {"0"}

    assert main(["status", "--url", deployment.url]) == 0
    shown = capsys.readouterr().out
    assert all(each.lora_name in shown for each in adapters)


def test_other_paths_say_what_there_is(deployment: Deployment) -> None:
    answer = deployment.get("/v1/models")
    assert answer.status_code == 404
    assert "/metrics" in answer.json()["error"]["message"]


def test_a_port_that_is_taken_ends_the_start_with_its_number(llama: Scenario) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"multilora": {"status_port": f"127.0.0.1:{port}"}}
        with (
            pytest.raises(Exception, match=f"status-port 127.0.0.1:{port}.*free"),
            running_engine(llama.base, in_process=True, additional_config=settings),
        ):
            pass
