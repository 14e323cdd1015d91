"""A path that is no folder is a repository of the hub only where that is allowed."""

from pathlib import Path

import pytest

from vllm_multilora.adapters.adapter_errors import AdapterNotFoundError
from vllm_multilora.adapters.blend import Blend, BlendError, BlendPart, folders_of
from vllm_multilora.sources.hub import fetched, located


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one repository in it, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--acme--medical"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (snapshot / "adapter_config.json").write_text("{}")
    return snapshot


def test_paths_of_folders_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "medical").mkdir()
    (tmp_path / "acme" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert located("medical") == located("~/medical") == str(tmp_path / "medical")
    assert located("/not/there") == "/not/there"
    assert located("acme/medical") == "acme/medical"
    assert located("acme/here") == str(tmp_path / "acme" / "here")
    assert located("../elsewhere") == f"{tmp_path}/../elsewhere"  # whether it exists or not
    assert Path(located("x" * 5000)).is_absolute()  # no file system has it: said when opened
    assert Path(located("~nobody-has-this-name/a")).is_absolute()  # likewise
    assert fetched("/not/there", is_allowed=False) == "/not/there"


@pytest.mark.parametrize("is_allowed", [False, True])
def test_a_url_is_called_what_it_is(hub: Path, is_allowed: bool) -> None:
    assert located("s3://acme/medical") == "s3://acme/medical"
    with pytest.raises(AdapterNotFoundError, match="s3://acme/medical is a URL"):
        fetched("s3://acme/medical", is_allowed=is_allowed)


def test_of_a_blend_each_parts_path_is_looked_at(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    blend = Blend.of([BlendPart(1, "a", "here", 1.0), BlendPart(2, "b", "acme/medical", 0.5)])
    found = located(blend.source)
    assert folders_of(found) == (str(tmp_path / "here"), "acme/medical")
    assert folders_of(fetched(found, is_allowed=True)) == (str(tmp_path / "here"), str(hub))
    with pytest.raises(BlendError):
        located("blend:nonsense")


def test_the_hub_is_not_asked_unless_it_may_be(hub: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="--multilora-allow-hub"):
        fetched("acme/medical", is_allowed=False)


def test_a_repository_is_its_snapshot(hub: Path) -> None:
    assert fetched("acme/medical", is_allowed=True) == str(hub)


@pytest.mark.parametrize("name", ["acme/unknown", "not/a/repository", "acme/me\ndical"])
def test_what_the_hub_does_not_have_is_not_found(hub: Path, name: str) -> None:
    with pytest.raises(AdapterNotFoundError, match="is not a folder here"):
        fetched(name, is_allowed=True)
