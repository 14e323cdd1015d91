"""The doctor sees what keeps Triton from compiling, and which kernels starts have chosen."""

import sysconfig
from pathlib import Path

import pytest

from multilora_kernels.trial import records
from multilora_kernels.trial.choices import Choice
from vllm_multilora.integration.offline import gpu_tools


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine that has all that Triton needs; its folder."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(include))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton" / "cache"))
    monkeypatch.setenv("MULTILORA_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("CC", "cc")
    return tmp_path


def problems() -> list[str]:
    return list(gpu_tools.triton_problems())


def test_a_machine_with_all_that_triton_needs_has_no_problems(machine):
    assert problems() == []
    assert not (machine / "triton").exists()


def test_a_cache_folder_that_cannot_be_written_is_a_problem(machine, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/version/cache")
    [problem] = problems()
    assert problem.startswith("Triton cannot keep compiled kernels in /proc/version/cache: ")
    assert "set TRITON_CACHE_DIR" in problem


def test_without_a_compiler_or_headers_the_problem_says_what_to_install(machine, monkeypatch):
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(machine))
    (machine / "include" / "Python.h").unlink()
    assert [problem.rpartition(" ")[2] for problem in problems()] == ["gcc", "python3-dev"]


def test_triton_s_folder_follows_triton_s_own_variables(machine, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(machine))
    assert gpu_tools.triton_folder() == machine / ".triton" / "cache"
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.setenv("HOME", str(machine / "home"))
    assert gpu_tools.triton_folder() == machine / "home" / ".triton" / "cache"


def test_kernels_that_were_chosen_are_shown_with_card_and_date(machine, monkeypatch):
    assert list(gpu_tools.chosen_kernels()) == []
    folder = records.default_folder()
    assert folder is not None
    choice = Choice(((None, "vllm"),), {"ours": "row 3 is off"})
    entry = records.RecordEntry("linear 208 -> 128", ("down_proj",), choice)
    record = records.Record({"card": "NVIDIA H100"}, (entry,))
    records.save(records.path_of(folder, record.facts, []), record)
    heading, line = gpu_tools.chosen_kernels()
    assert heading.startswith("NVIDIA H100, 20")
    assert line == "  linear 208 -> 128  vllm (ours: row 3 is off)"
    assert folder.stat().st_mode & 0o077 == 0
