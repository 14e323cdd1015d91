"""Where adapters may lie, with all links resolved."""

import os
from pathlib import Path

import pytest

from vllm_multilora.adapters.adapter_errors import AdapterFormatError
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.problems import Code
from vllm_multilora.config import MultiLoRAConfig


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Folders `roots/a`, `served/b`, `other/c`, and links to each of them in `served`."""
    for name in ("roots/a", "served/b", "other/c"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("roots/a", "served/b", "other/c"):
        (tmp_path / "served" / f"to-{name[-1]}").symlink_to(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("roots", "directories", "allowed"),
    [
        ((), (), {"roots/a", "served/b", "other/c", "served/to-a", "served/to-b", "served/to-c"}),
        (("roots",), (), {"roots/a", "served/to-a"}),
        ((), ("served",), {"roots/a", "served/b", "other/c", "served/to-b"}),
        (("roots",), ("served",), {"roots/a", "served/b", "served/to-a", "served/to-b"}),
    ],
    ids=["anywhere", "roots", "directory", "both"],
)
def test_what_is_allowed(place, roots, directories, allowed):
    settings = MultiLoRAConfig(
        allowed_roots=tuple(str(place / root) for root in roots),
        adapter_dir=tuple(str(place / directory) for directory in directories),
    )
    rules = AllowedRoots(settings.allowed_roots, settings.directories)
    paths = {"roots/a", "served/b", "other/c", "served/to-a", "served/to-b", "served/to-c"}
    assert {path for path in paths if rules.allows(place / path)} == allowed

    for path in paths:
        real = os.path.realpath(place / path)
        if path in allowed:
            rules.require(place / path, real)
        else:
            with pytest.raises(AdapterFormatError) as caught:
                rules.require(place / path, real)
            assert [problem.code for problem in caught.value.problems] == [Code.NOT_ALLOWED]
            assert "--multilora-adapter-dir" in str(caught.value)
