"""A program that measures servers."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.clients.site import BASE, SOURCES, Site
from tests.serving.engine import environment as serving_environment

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
