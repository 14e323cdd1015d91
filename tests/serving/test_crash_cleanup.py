"""Processes that are killed leave no shared memory behind, or not for longer than the next start.

The engine core makes a file in `/dev/shm` while it starts, through which its workers find the log
of ready adapters, and removes the name once all have opened it.
"""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from vllm_multilora.cache.shared_segment import segment_folder

from .cases import NEW_TOKENS, Scenario
from .server import ServerStartError, VllmServer

pytestmark = pytest.mark.serving

NAME = "customer-1"
START_LIMIT_S = 180.0
EXIT_LIMIT_S = 60.0


def make_server(fleet: Scenario, log: Path) -> VllmServer:
    return VllmServer(
        fleet.base,
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128"),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"),
        *("--lora-modules", f"{NAME}={fleet.adapters[NAME]}"),
        log=log,
    )


def assert_serves(server: VllmServer, fleet: Scenario) -> None:
    (case,) = fleet.cases_of(NAME)
    response = server.post(
        "/v1/completions",
        {
            "model": NAME,
            "prompt": list(case.prompt),
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    assert response.status_code == 200, response.text
    assert tuple(response.json()["choices"][0]["token_ids"]) == case.expected.tokens


def segments_of(processes: set[int]) -> list[Path]:
    """The plugin's files in shared memory that one of these processes has made."""
    return [
        path
        for path in segment_folder().glob("vllm-multilora-*")
        if int(path.name.split("-")[3]) in processes
    ]


def family(server: VllmServer) -> dict[int, psutil.Process]:
    """The server's processes by id."""
    leader = psutil.Process(server.pid)
    return {process.pid: process for process in (leader, *leader.children(recursive=True))}


def has_mapped_removed_segment(process: psutil.Process) -> bool:
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return any("vllm-multilora-" in line and line.endswith("(deleted)") for line in lines)


def kill_and_await_the_others(server: VllmServer, process: psutil.Process) -> None:
    processes = list(family(server).values())
    os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=EXIT_LIMIT_S)
    assert not alive, server.log_tail()


def kill_engine_core_while_it_starts(server: VllmServer) -> Path:
    """Kills the process that made the log before it has removed the name; the file it leaves."""
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(server.__enter__)
        deadline = time.monotonic() + START_LIMIT_S
        left: list[Path] = []
        while not left:
            assert not started.done(), "the server came up and its log was never seen"
            assert time.monotonic() < deadline
            time.sleep(0.01)
            try:
                left = segments_of(set(family(server)))
            except (RuntimeError, psutil.NoSuchProcess):
                continue  # not started yet
        os.kill(int(left[0].name.split("-")[3]), signal.SIGKILL)
        with pytest.raises(ServerStartError):
            started.result()
    return left[0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_what_killed_processes_leave_is_gone_after_the_next_start(
    fleet: Scenario, tmp_path: Path
) -> None:
    left = kill_engine_core_while_it_starts(make_server(fleet, tmp_path / "killed.log"))
    assert left.exists()
    for victim in ("VLLM::EngineCore", "VLLM::Worker"):
        with make_server(fleet, tmp_path / f"{victim[6:]}.log") as server:
            assert not left.exists(), server.log_tail()
            assert_serves(server, fleet)
            members = family(server)
            engine = [p for p in members.values() if p.cmdline()[0].startswith("VLLM::")]
            assert len(engine) == 2
            assert all(has_mapped_removed_segment(process) for process in engine)
            assert segments_of(set(members)) == []
            (process,) = (p for p in engine if p.cmdline()[0].startswith(victim))
            kill_and_await_the_others(server, process)
            assert segments_of(set(members)) == []
