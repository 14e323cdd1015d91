"""The engine's folder: found by its instance, and gone after its maker's end."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_multilora.metrics.folder import (
    create_folder,
    find_folder,
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


def test_a_start_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from vllm_multilora.metrics.folder import create_folder; "
        f"(create_folder('dead', Path({str(tmp_path)!r})) / 'file').touch()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert find_folder("dead", tmp_path) is not None
    living = create_folder("living", tmp_path)
    (tmp_path / "multilora-metrics-of-somebody").mkdir()
    (tmp_path / "multilora-metrics-1-2-3-link").symlink_to(living)
    create_folder("new", tmp_path)
    assert find_folder("dead", tmp_path) is None
    assert find_folder("living", tmp_path) == living
    assert len(list(tmp_path.iterdir())) == 4


def test_folders_are_where_vllm_keeps_its_values_of_several_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    assert parent_folder() != tmp_path
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert parent_folder() == tmp_path
