"""The engine's folder: found by its instance, and gone after its maker's end."""

import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_multilora.integration.recording import FOLDER_VARIABLE, make_folder
from vllm_multilora.integration.server.requests import metrics_route
from vllm_multilora.metrics.value_folder import (
    create_folder,
    find_folder,
    locked,
    parent_folder,
    remove_folder,
)


@pytest.mark.parametrize("instance", ["1764021600123456789", "../an odd / one", "x" * 300])
def test_an_instance_finds_its_own_folder(tmp_path: Path, instance: str) -> None:
    create_folder(f"{instance}-other", tmp_path)
    assert find_folder(instance, tmp_path) is None
    folder = create_folder(instance, tmp_path)
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert find_folder(instance, tmp_path) == folder
    remove_folder(folder)
    remove_folder(folder)
    assert find_folder(instance, tmp_path) is None


UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")
MAKE = (
    "from pathlib import Path; from vllm_multilora.metrics.value_folder import create_folder; "
    "import sys; (create_folder(sys.argv[1], Path(sys.argv[2])) / 'file').touch(); "
)


def test_a_start_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", MAKE, "dead", tmp_path], check=True, timeout=60)
    assert find_folder("dead", tmp_path) is not None
    living = create_folder("living", tmp_path)
    (tmp_path / "multilora-metrics-of-somebody").mkdir()
    (tmp_path / "multilora-metrics-link.engine").symlink_to(living)
    create_folder("new", tmp_path)
    assert find_folder("dead", tmp_path) is None
    assert find_folder("living", tmp_path) == living
    assert len(list(tmp_path.iterdir())) == 4


def test_what_the_dead_left_without_a_name_is_removed_when_nobody_can_be_at_it(
    tmp_path: Path,
) -> None:
    die = "import fcntl, os; fcntl.flock = lambda *_: os._exit(0); "
    for _ in range(2):
        subprocess.run([sys.executable, "-c", die + MAKE, "dead", tmp_path], check=True, timeout=60)
    old, new = tmp_path.iterdir()
    hour_ago = time.time() - 3600
    os.utime(old, (hour_ago, hour_ago))
    living = create_folder("living", tmp_path)
    assert {*tmp_path.iterdir()} == {new, living}


@pytest.mark.parametrize("end", ["is killed", "lives"])
def test_who_has_died_is_known_in_another_container_too(tmp_path: Path, end: str) -> None:
    """Which has process ids of its own, where such may be made, and shared memory with this one."""
    program = MAKE + "print('made', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program, "other", str(tmp_path)]
    if shutil.which("unshare") and subprocess.run([*UNSHARE, "true"], check=False).returncode == 0:
        words = [*UNSHARE, *words]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        if end == "is killed":
            process.kill()
            process.stdout.read()  # until nobody is left in there
        create_folder("new", tmp_path)
        assert (find_folder("other", tmp_path) is None) == (end == "is killed")


def test_an_instance_that_has_a_folder_gets_no_other_one(tmp_path: Path) -> None:
    (create_folder("one", tmp_path) / "file").touch()
    with pytest.raises(OSError, match="not empty"):
        create_folder("one", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["multilora-metrics-one.engine"]


def test_whoever_reads_waits_for_who_changes_files_but_not_for_long(tmp_path: Path) -> None:
    with locked(tmp_path, exclusively=True):
        begun = time.monotonic()
        with locked(tmp_path, exclusively=False):
            assert 0.1 <= time.monotonic() - begun < 30
    with (
        locked(tmp_path, exclusively=False),
        locked(tmp_path, exclusively=False),
        pytest.raises(BlockingIOError),
        locked(tmp_path, exclusively=True),
    ):
        pass


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_removed_folder_leaves_no_descriptor(tmp_path: Path) -> None:
    gc.collect()  # what other tests have left may hold descriptors
    before = descriptors()
    for number in range(5):
        remove_folder(create_folder(str(number), tmp_path))
    assert descriptors() == before


def test_folders_are_where_vllm_keeps_its_values_of_several_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert parent_folder() != tmp_path
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert parent_folder() == tmp_path


def test_an_engine_that_has_ended_leaves_no_folder_in_a_process_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has counted nothing has kept nothing of it either."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv(FOLDER_VARIABLE, "")
    monkeypatch.setattr(metrics_route, "manages_adapters", lambda config: True)
    config: Any = type("Config", (), {"instance_id": "an engine"})()
    config.parallel_config = SimpleNamespace(_api_process_count=1, _api_process_rank=0)
    make_folder(config)
    metrics_route.show(config)
    (folder,) = tmp_path.iterdir()
    assert find_folder("an engine", tmp_path) == folder
    del config
    gc.collect()
    assert not folder.exists()
