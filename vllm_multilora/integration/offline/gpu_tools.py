"""What Triton needs on a machine to compile kernels, and which kernels were chosen there before."""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from multilora_kernels.trial import records

MAX_RECORDS = 3
"""Records that are shown, newest first: a machine has few kinds of server."""


def triton_problems() -> Iterator[str]:
    """What would keep Triton from compiling kernels here, and what to do: a sentence each."""
    folder = triton_folder()
    if problem := _not_writable(folder):
        yield (
            f"Triton cannot keep compiled kernels in {folder}: {problem}; set TRITON_CACHE_DIR to "
            f"a folder that can be written"
        )
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield (
            "Triton finds no C compiler (it looks for $CC, gcc, clang) for the code that starts "
            "kernels: apt-get install gcc"
        )
    if not (header := Path(sysconfig.get_path("include")) / "Python.h").is_file():
        yield (
            f"{header} is missing, which the code that starts Triton's kernels includes: "
            f"install Python's headers, such as the package python3-dev"
        )


def triton_folder() -> Path:
    """Where Triton keeps compiled kernels, by its own environment variables."""
    if given := os.environ.get("TRITON_CACHE_DIR"):
        return Path(given)
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # noqa: PTH111 (Triton's way)
    return Path(home) / ".triton" / "cache"


def chosen_kernels() -> Iterator[str]:
    """Lines about the kernels that were chosen on this machine, by card and date."""
    folder = records.default_folder()
    for record in [] if folder is None else records.latest(folder, MAX_RECORDS):
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.written))
        yield f"{record.facts.get('card', 'unknown card')}, {day}"
        yield from (f"  {line}" for line in record.lines())


def _not_writable(folder: Path) -> str:
    """Why a folder cannot be made or written; empty if it can. Nothing is left behind."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return error.strerror or str(error)
