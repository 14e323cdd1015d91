"""Folders in memory: this user's alone, and gone after the process that made them."""

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from vllm_multilora.integration import memory_folders
from vllm_multilora.integration.memory_folders import own_folder, users_folder

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_folders, "MEMORY", tmp_path)


def make_one(answers: Connection) -> None:
    """Makes a folder with an adapter, says where or why not, and lives until it is killed."""
    try:
        folder = own_folder()
    except OSError as error:
        answers.send(str(error))
    else:
        (folder / "adapter").mkdir()
        answers.send(str(folder))
    answers.recv()


class Makers:
    """Processes that make folders."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        self.pipes: list[Connection] = []

    def start(self) -> str:
        """Starts one more; returns what it says."""
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=make_one, args=(theirs,))
        process.start()
        self.processes.append(process)
        self.pipes.append(ours)
        assert ours.poll(LIMIT_S)
        return str(ours.recv())

    def end(self, number: int) -> None:
        """Has a process end by itself."""
        self.pipes[number].send("end")
        self.processes[number].join(LIMIT_S)

    def kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].join(LIMIT_S)


@pytest.fixture
def makers() -> Iterator[Makers]:
    running = Makers()
    yield running
    for number in range(len(running.processes)):
        running.kill(number)


def test_folders_of_killed_processes_go_and_those_of_living_ones_stay(makers: Makers) -> None:
    killed, living = Path(makers.start()), Path(makers.start())
    assert (killed / "adapter").is_dir()
    makers.kill(0)
    third = Path(makers.start())
    assert not killed.exists()
    assert (living / "adapter").is_dir()
    assert (third / "adapter").is_dir()


def test_a_folder_goes_when_its_process_ends(makers: Makers) -> None:
    folder = Path(makers.start())
    assert folder.is_dir()
    makers.end(0)
    assert not folder.exists()


def test_a_folder_that_others_can_write_to_is_refused(makers: Makers) -> None:
    users_folder().chmod(0o777)
    assert "other users can write to it: remove it" in makers.start()
