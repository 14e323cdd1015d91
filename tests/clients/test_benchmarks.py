"""Programs that measure servers."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import installed, run
from tests.clients.site import BASE, SOURCES, Site
from tests.serving.engine import environment as serving_environment
from tests.serving.models.cases import NEW_TOKENS

pytestmark = [pytest.mark.serving, pytest.mark.clients]

REQUESTS, OUTPUT_TOKENS = 6, 8


@pytest.mark.proves("requests for adapters in turn all succeed, with every token asked for")
def test_vllm_bench_serve_measures_adapters(
    open_site: Site, tmp_path: Path, tried: Callable[[str, str], None]
) -> None:
    tried("`vllm bench serve`", version("vllm"))
    result = tmp_path / "result.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"),
            *("--base-url", open_site.url, "--model", BASE, "--tokenizer"),
            *(str(open_site.scenario.base), "--dataset-name", "random", "--ignore-eos"),
            *("--random-input-len", "8", "--random-output-len", str(OUTPUT_TOKENS)),
            *("--num-prompts", str(REQUESTS), "--lora-assignment", "round-robin"),
            *("--disable-tqdm", "--save-result", "--result-filename", str(result)),
            *("--lora-modules", *SOURCES),
        ],
        env=serving_environment({"VLLM_PLUGINS": ""}),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measured = json.loads(result.read_text())
    assert (measured["completed"], measured["failed"]) == (REQUESTS, 0)
    assert measured["total_output_tokens"] == REQUESTS * OUTPUT_TOKENS


def run_guidellm(site: Site, model: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The requests of one run of GuideLLM, which has one model and two streams, by outcome."""
    prompts, scenario, report = (
        folder / f"{model}{end}" for end in (".jsonl", "-scenario.json", "-report.json")
    )
    prompts.write_text(REQUESTS * (json.dumps({"prompt": site.prompt(model)}) + "\n"))
    spec = {
        "backend": {
            "kind": "openai_http",
            "target": site.url,
            "model": model,
            "request_format": "/v1/completions",
            "extras": {"body": {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}},
        },
        "profile": {"kind": "concurrent", "streams": 2},
        "constraints": [{"kind": "max_requests", "count": REQUESTS}],
        "tokenizer": {"kind": "huggingface_auto", "model": str(site.scenario.base)},
        "data": [{"kind": "json_file", "path": str(prompts)}],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    scenario.write_text(json.dumps({"spec": spec}))
    run("guidellm", "run", "--config", str(scenario), "--disable-console")
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests: dict[str, list[dict[str, Any]]] = benchmark["requests"]
    return requests


@pytest.mark.proves("two runs at the same time, one for each adapter; every answer is PEFT's")
def test_guidellm_measures_two_adapters(
    open_site: Site, tmp_path: Path, tried: Callable[[str, str], None]
) -> None:
    tried("GuideLLM", installed("guidellm"))
    with ThreadPoolExecutor(len(SOURCES)) as threads:
        runs = threads.map(lambda model: run_guidellm(open_site, model, tmp_path), SOURCES)
        for model, requests in zip(SOURCES, runs, strict=True):
            answers = [each["output"] for each in requests.pop("successful")]
            assert answers == [open_site.expected(model)] * REQUESTS, model
            assert not any(requests.values())
