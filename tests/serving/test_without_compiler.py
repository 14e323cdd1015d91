"""A CPU without a C++ compiler serves requests for log-probabilities, and says what it leaves out.

vLLM's own engine ends at the first such request there: it compiles the ranks of tokens.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import completions
from .models.cases import Scenario
from .server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

NO_COMPILER = {"CXX": "/nonexistent/g++"}
ADAPTER = "all-linear-r8"


def test_a_request_for_logprobs_without_a_compiler_is_answered(
    llama: Scenario, tmp_path: Path
) -> None:
    arguments = (
        *("--enable-lora", "--max-lora-rank", "64", "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4", "--block-size", "32"),
        *("--lora-modules", f"{ADAPTER}={llama.adapters[ADAPTER]}"),
    )
    env = NO_COMPILER | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    with VllmServer(
        llama.base, *arguments, log=tmp_path / "log", env=env, new_interpreter=True
    ) as server:
        (case, *_) = llama.cases_of(ADAPTER)
        for _ in range(2):  # the engine still lives
            response = completions.ask(server, ADAPTER, case, logprobs=2)
            assert response.status_code == 200, response.text
            (choice,) = response.json()["choices"]
            assert len(choice["logprobs"]["top_logprobs"]) == len(case.expected.tokens)
            assert completions.token_ids(response) == case.expected.tokens
        assert server.log.read_text().count("torch.compile is off in this process") == 1


def test_the_doctor_says_that_there_is_no_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_multilora.cli", "doctor"],
        env=os.environ | NO_COMPILER,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "torch.compile   No working C++ compiler found" in done.stdout
