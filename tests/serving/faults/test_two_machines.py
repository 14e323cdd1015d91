"""One server with a worker on each of two machines, which have a store each.

Here both are this machine, under two folders of stores: that is what tells machines apart.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE, socket_path

from .. import completions, template
from ..engine import KV_CACHE_BYTES, environment
from ..models.cases import Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer, free_port
from ..stores import await_end, store_process

pytestmark = [pytest.mark.serving, pytest.mark.slow]

BASE = "base"
NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES)
LIMIT_S = 60.0


class Machines:
    """The running server, with its stores' folders."""

    def __init__(self, server: VllmServer, folders: list[Path], scenario: Scenario) -> None:
        self.server = server
        self.folders = folders
        self.scenario = scenario

    def load(self, name: str, path: Path):
        body = {"lora_name": name, "lora_path": str(path)}
        return self.server.post("/v1/load_lora_adapter", body)

    def assert_serves(self, name: str, of: str) -> None:
        cases = self.scenario.cases_of(of)
        with ThreadPoolExecutor(len(cases)) as pool:
            for done in [
                pool.submit(completions.assert_serves, self.server, name, case) for case in cases
            ]:
                done.result()


@pytest.fixture(scope="module")
def machines(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    root = tmp_path_factory.mktemp("machines")
    folders = [root / "here", root / "there"]
    for folder in folders:
        folder.mkdir(mode=0o700)
    settings = (
        *("--tensor-parallel-size", "2", "--nnodes", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(KV_CACHE_BYTES)),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--max-lora-rank", "64"),
    )
    env = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with (root / "there.log").open("wb") as log:
        there = template.start_server(
            ["serve", str(llama.base), *settings, "--node-rank", "1", "--headless"],
            environment(env | {FOLDER_VARIABLE: str(folders[1])}),
            log.fileno(),
        )
        try:
            with VllmServer(
                llama.base,
                *settings,
                log=root / "here.log",
                env=env | {FOLDER_VARIABLE: str(folders[0])},
            ) as server:
                yield Machines(server, folders, llama)
        finally:
            os.killpg(there.pid, signal.SIGKILL)
            there.wait()


def test_adapters_are_loaded_in_the_background_and_answer_as_peft(machines: Machines) -> None:
    assert "in the background on 1 other machine" in machines.server.log.read_text()
    for name in NAMES:
        assert machines.load(name, machines.scenario.adapters[name]).status_code == 200
    for name in (*NAMES, *NAMES[:3]):  # more than there are slots, and places in host memory
        machines.assert_serves(name, name)
    assert "The store has gone" not in machines.server.log.read_text()


def test_each_machine_has_its_own_copy(machines: Machines) -> None:
    rows = machines.server.get("/v1/lora_adapters").json()
    assert rows["cpu"]["adapters"] <= 4
    assert rows["cpu"]["bytes_limit"] is None
    assert all(socket_path(folder).exists() for folder in machines.folders)


def test_a_bad_adapter_is_refused_with_its_problems(machines: Machines, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no tensors")
    response = machines.load("bad", tmp_path)
    assert response.status_code == 400, response.text
    assert "adapter_config.json" in response.text
    response = machines.load("gone", tmp_path / "nothing")
    assert response.status_code == 404, response.text


@pytest.mark.parametrize("which", [0, 1], ids=["here", "there"])
def test_the_end_of_either_store_costs_nothing(machines: Machines, which: int) -> None:
    store = store_process(socket_path(machines.folders[which]))
    store.kill()
    await_end(store, LIMIT_S)
    for name in NAMES[:4]:
        machines.assert_serves(name, name)
    assert store_process(socket_path(machines.folders[which])).pid != store.pid
