"""Adapters of experts that are reloaded and unloaded while mixed batches run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from .. import completions
from ..engine import BEFORE_0_32
from ..models.cases import Case, Scenario
from ..server import VllmServer
from .families import LENGTH, ONE_BY_ONE, SOME

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(BEFORE_0_32, reason="vLLM's experts have another interface before 0.32"),
]

BASE = "base"
VERSIONS = (f"{SOME}{ONE_BY_ONE}", "experts-r8", f"patterns{ONE_BY_ONE}", "experts-r3")
"""What one name is loaded with: some experts at several ranks, all as one, and one by one."""

OTHERS = ("dense-only", "router-beside-experts", f"experts-r8{ONE_BY_ONE}")


@pytest.fixture
def server(model: Scenario, tmp_path: Path) -> Iterator[VllmServer]:
    with VllmServer(
        model.base,
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "128", "--max-num-seqs", "8"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={model.adapters[name]}" for name in OTHERS)),
        log=tmp_path / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as running:
        yield running


def case_of(model: Scenario, adapter: str | None) -> Case:
    return next(case for case in model.cases_of(adapter) if len(case.prompt) == LENGTH)


def tokens_while(server: VllmServer, case: Case, name: str, started: threading.Event) -> list[int]:
    """The tokens of a stream; `started` is set once the first has come."""
    body = completions.body(name, case, stream=True)
    tokens: list[int] = []
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        for line in filter(None, response.iter_lines()):
            if line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                tokens += event["choices"][0]["token_ids"] or ()
                started.set()
    return tokens


@pytest.mark.parametrize("model", ["qwen3-moe"], indirect=True)
def test_experts_of_a_name_change_and_go_while_other_adapters_are_served(
    model: Scenario, server: VllmServer
) -> None:
    """There are more adapters than slots, so that slots change their owners, too."""
    stop = threading.Event()

    def keep_asking(adapter: str | None) -> int:
        count = 0
        while not stop.is_set():
            completions.assert_serves(server, adapter or BASE, case_of(model, adapter))
            count += 1
        return count

    def load(version: str) -> None:
        body = {"lora_name": "moves", "lora_path": str(model.adapters[version])}
        response = server.post("/v1/load_lora_adapter", {**body, "load_inplace": True})
        assert response.status_code == 200, response.text

    with ThreadPoolExecutor(len(OTHERS) + 2) as pool:
        asking = [pool.submit(keep_asking, adapter) for adapter in (None, *OTHERS)]
        try:
            load(VERSIONS[0])
            for before, after in zip(VERSIONS, (*VERSIONS[1:], VERSIONS[0]), strict=True):
                case, started = case_of(model, before), threading.Event()
                running = pool.submit(tokens_while, server, case, "moves", started)
                assert started.wait(60)
                load(after)
                assert tuple(running.result(60)) == case.expected.tokens
                completions.assert_serves(server, "moves", case_of(model, after))
            assert server.post("/v1/unload_lora_adapter", {"lora_name": "moves"}).is_success
            gone = completions.ask(server, "moves", case_of(model, VERSIONS[0]))
            assert gone.status_code == 404
        finally:
            stop.set()
        assert all(future.result(60) for future in asking)
