"""Whatever process of a server is killed, its store ends, and the next start is a clean one."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE, socket_path

from .. import template
from ..completions import ask, assert_serves, body, token_ids
from ..engine import store_folder
from ..models.cases import Scenario
from ..server import VllmServer
from ..stores import await_end, store_process

pytestmark = [pytest.mark.serving, pytest.mark.slow]

NAME, OTHER, COLD = "customer-1", "customer-2", "customer-3"
PLACES = 2
"""In host memory: none for what is registered last."""

EXIT_LIMIT_S = 60.0
STORE_LIMIT_S = 5.0
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the stores of all servers here are found, one after the other."""
    with store_folder() as name:
        yield Path(name)


def make_server(fleet: Scenario, folder: Path, log: Path, *args: str) -> VllmServer:
    return VllmServer(
        fleet.base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"),
        *("--max-cpu-loras", str(PLACES), "--lora-modules"),
        *(f"{name}={fleet.adapters[name]}" for name in (NAME, OTHER, COLD)),
        *args,
        log=log,
        env={FOLDER_VARIABLE: str(folder), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )


def serve(server: VllmServer, fleet: Scenario) -> None:
    (case,) = fleet.cases_of(NAME)
    assert_serves(server, NAME, case)


def family(server: VllmServer) -> list[psutil.Process]:
    """The server's processes; its store is none of them."""
    leader = psutil.Process(server.pid)
    return [leader, *leader.children(recursive=True)]


def started(parent: psutil.Process) -> psutil.Process:
    """The one process that a process of vLLM has started, by its template."""
    (its_template,) = (child for child in parent.children() if child.name() == template.NAME)
    (one,) = (child for child in its_template.children() if child.name() != template.NAME)
    return one


def own_shared_memory() -> set[str]:
    """Names in shared memory; those of metrics outlive a killed process until the next start."""
    names = {path.name for path in SHARED_MEMORY.glob("*multilora*")}
    return {name for name in names if not name.startswith("multilora-metrics-")}


@pytest.mark.parametrize("victim", ["engine core", "worker", "all and the store"])
def test_nothing_is_left_when_processes_are_killed(
    fleet: Scenario, folder: Path, tmp_path: Path, victim: str
) -> None:
    before = own_shared_memory()
    with make_server(fleet, folder, tmp_path / "vllm.log") as server:
        serve(server, fleet)
        store, members = store_process(socket_path(folder)), family(server)
        core = started(members[0])
        if victim == "engine core":
            core.kill()
        elif victim == "worker":
            started(core).kill()
        else:
            store.kill()
            os.killpg(server.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(members, timeout=EXIT_LIMIT_S)
        assert not alive, server.log_tail()
    await_end(store, STORE_LIMIT_S)
    assert own_shared_memory() == before
    # What a killed store leaves is removed by the next one, that of the test below for instance.
    assert socket_path(folder).exists() == (victim == "all and the store")


def test_a_server_that_is_being_stopped_says_so_and_answers_what_waits_for_its_adapter(
    fleet: Scenario, folder: Path, tmp_path: Path
) -> None:
    """It takes its store along, whatever a killed one has left before."""
    (case,) = fleet.cases_of(COLD)
    limit_s = ("--shutdown-timeout", "60")
    with (
        make_server(fleet, folder, tmp_path / "vllm.log", *limit_s) as server,
        ThreadPoolExecutor(1) as client,
    ):
        serve(server, fleet)
        leader, store = psutil.Process(server.pid), store_process(socket_path(folder))
        store.suspend()
        try:
            cold = client.submit(ask, server, COLD, case)
            await_arrival(server)
            os.kill(server.pid, signal.SIGTERM)
            deadline = time.monotonic() + EXIT_LIMIT_S
            while (listing := server.get("/v1/lora_adapters")).status_code == 200:
                assert time.monotonic() < deadline, server.log_tail()
            adapter = {"lora_name": "another", "lora_path": str(fleet.adapters[COLD])}
            refusals = [
                listing,
                server.post("/v1/load_lora_adapter", adapter),
                server.post("/v1/completions", {"model": NAME, "prompt": "t1 t2"}),
                server.post("/v1/completions", {"model": NAME, "prompt": "t1", "stream": True}),
                server.post("/v1/completions", {"model": NAME, "prompt": [5, 17]}),
                server.get("/health"),
                server.post("/v1/unload_lora_adapter", {"lora_name": NAME}),
            ]
        finally:
            store.resume()
        for refusal in refusals:
            assert refusal.status_code == 503, refusal.text
            assert "being stopped" in refusal.json()["error"]["message"]
            assert refusal.headers["retry-after"] == "2"
        assert token_ids(cold.result()) == case.expected.tokens
        leader.wait(EXIT_LIMIT_S)
    await_end(store, STORE_LIMIT_S)
    assert not socket_path(folder).exists()
    assert "Exception in ASGI application" not in server.log.read_text()


def test_what_a_server_cuts_off_when_it_is_stopped_says_so(
    fleet: Scenario, folder: Path, tmp_path: Path
) -> None:
    (cold,), (case,) = fleet.cases_of(COLD), fleet.cases_of(NAME)
    long = body(NAME, case, stream=True, max_tokens=100)
    with (
        make_server(fleet, folder, tmp_path / "vllm.log") as server,
        ThreadPoolExecutor(2) as clients,
    ):
        store = store_process(socket_path(folder))
        serve(server, fleet)
        store.suspend()
        try:
            waiting = [
                clients.submit(ask, server, COLD, cold, stream=is_stream)
                for is_stream in (False, True)
            ]
            await_arrival(server)
            url = f"{server.url}/v1/completions"
            with httpx.stream("POST", url, json=long, timeout=60, trust_env=False) as stream:
                lines = stream.iter_lines()
                next(lines)
                os.kill(server.pid, signal.SIGTERM)
                *_, event, _, done, _ = lines
            answers = [each.result(EXIT_LIMIT_S) for each in waiting]
        finally:
            store.resume()
    assert done == "data: [DONE]"
    errors = [json.loads(event.removeprefix("data: ")), *(each.json() for each in answers)]
    for error in errors:
        assert error["error"]["code"] == 503, error
        assert error["error"]["message"].startswith("the server is being stopped")
    assert [each.status_code for each in answers] == [503, 503]
    assert [each.headers["retry-after"] for each in answers] == ["2", "2"]


def await_arrival(server: VllmServer) -> None:
    """Returns when the engine has asked the store for the cold adapter."""
    deadline = time.monotonic() + EXIT_LIMIT_S
    while state_of(server, COLD) not in ("queued", "reading"):
        assert time.monotonic() < deadline, state_of(server, COLD)


def state_of(server: VllmServer, name: str) -> str:
    (row,) = (r for r in server.get("/v1/lora_adapters").json()["data"] if r["id"] == name)
    return str(row["state"])
