"""Machines that differ from those tested: a newer vLLM, and no C++ compiler.

On a newer vLLM each part of the plugin decides for itself. Without a compiler vLLM's own engine
ends at the first request for log-probabilities, whose ranks it compiles. Each start here reads
thousands of files, so both are in one.
"""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.attacks.tenant_server import KEYS, write_tenants
from tests.newer_vllm import BROKEN_CORE, BROKEN_GATEWAY, VERSION, make_newer

from .. import completions
from ..models.cases import Scenario
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

ADAPTER = "all-linear-r8"
LORA = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64", "--dtype", "float32")
SIZE = ("--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4", "--block-size", "32")
CORE_ACTIVE = f"found {VERSION}: LoRA serving is active"
CORE_OFF = f"found {VERSION}: LoRA serving stays as vLLM has it, because of prefix-cache-keys: "
NO_COMPILER = {"CXX": "/nonexistent/g++"}
GATEWAY_OFF = f"found {VERSION}: the gateway (HTTP, names, keys, tenants) stays as vLLM has it"


def serve(scenario: Scenario, folder: Path, environment: dict[str, str], *args: str) -> VllmServer:
    modules = f"{ADAPTER}={scenario.adapters[ADAPTER]}"
    return VllmServer(
        scenario.base,
        *LORA,
        *SIZE,
        *("--lora-modules", modules, *args),
        log=folder / "vllm.log",
        env=environment,
        start_timeout=900.0,  # each process reads vLLM's files before it decides
        new_interpreter=True,
    )


def assert_adapter_answers(
    scenario: Scenario, server: VllmServer, key: str = "", **options: object
) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=server.url, trust_env=False, timeout=120, headers=headers) as client:
        for case in scenario.cases_of(ADAPTER):
            body = completions.body(ADAPTER, case, **options)
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            assert completions.token_ids(response) == case.expected.tokens
            if "logprobs" in options:
                logprobs = response.json()["choices"][0]["logprobs"]["top_logprobs"]
                assert len(logprobs) == len(case.expected.tokens)


def test_lora_and_logprobs_are_served_without_a_compiler_and_with_an_unfit_gateway(
    llama: Scenario, tmp_path: Path
) -> None:
    environment = make_newer(tmp_path / "newer", BROKEN_GATEWAY) | NO_COMPILER
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    with serve(llama, tmp_path, environment) as server:
        for _ in range(2):  # the engine still lives
            assert_adapter_answers(llama, server, logprobs=2)
        log = server.log.read_text()
    assert log.count("torch.compile is off in this process") == 1
    assert log.count(CORE_ACTIVE) == 1
    assert "is active; LoRA kernels: native" in log
    assert log.count(GATEWAY_OFF) == 1
    assert "because of error-texts: takes (message, hint='')" in log


def test_keys_guard_a_server_when_a_patch_for_lora_does_not_fit(
    llama: Scenario, tmp_path: Path
) -> None:
    environment = make_newer(tmp_path / "newer", BROKEN_CORE)
    write_tenants(tmp_path / "tenants.json", {"acme": {"adapters": [ADAPTER]}})
    tenants = ("--multilora-tenants", str(tmp_path / "tenants.json"))
    with serve(llama, tmp_path, environment, *tenants) as server:
        assert_adapter_answers(llama, server, KEYS["acme"] or "")
        case = llama.cases_of(ADAPTER)[0]
        refused = httpx.post(
            f"{server.url}/v1/completions", json=completions.body(ADAPTER, case), trust_env=False
        )
        assert refused.status_code == 401
        log = server.log.read_text()
    assert log.count(CORE_OFF) == 1
    assert "LoRA kernels: native" not in log
    assert GATEWAY_OFF not in log


def test_the_doctor_says_which_part_acts_and_that_there_is_no_compiler(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_multilora.cli", "doctor"],
        env={**os.environ, **NO_COMPILER, **make_newer(tmp_path, BROKEN_CORE)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert f"vLLM            {VERSION} (tested: " in done.stdout, done.stderr
    assert "core            inactive (see below)" in done.stdout
    assert "gateway         acts on this vLLM" in done.stdout
    assert "torch.compile   No working C++ compiler found" in done.stdout
    assert done.returncode == 1
