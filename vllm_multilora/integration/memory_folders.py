"""Folders in memory for adapters that no storage has: one folder for each process that makes any.

A process holds a lock on its folder while it lives. Whoever makes the next one removes those whose
process has ended, however it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from functools import lru_cache
from multiprocessing.util import Finalize
from pathlib import Path

from vllm_multilora.store.protocol.store_folder import fault_of_private

MEMORY = Path("/dev/shm")


def users_folder() -> Path:
    """The folder of this user's folders; nobody else can read it or write to it.

    Raises:
        PermissionError: Others can get at it.
    """
    parent = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    folder = parent / f"vllm-multilora-tensors-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if (fault := fault_of_private(folder)) is not None:
        raise PermissionError(
            f"{fault}: it is for adapters that are given as tensors, and other users can write to "
            "it: remove it"
        )
    return folder


def own_folder() -> Path:
    """This process's folder, made when it is first asked for."""
    return _made_by(os.getpid())


@lru_cache(maxsize=1)
def _made_by(process: int) -> Path:
    parent = users_folder()
    alone = os.open(parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX)  # nobody removes the new folder before it is locked
        for each in parent.iterdir():
            _remove_if_left(each)
        folder = Path(tempfile.mkdtemp(prefix=f"{process}-", dir=parent))
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)
    finally:
        os.close(alone)
    # Where `atexit` does nothing, too: in processes of multiprocessing.
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=0)
    return folder


def _remove_if_left(folder: Path) -> None:
    """Removes a folder whose process has ended."""
    with contextlib.suppress(OSError):  # it is in use, or somebody else removes it
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
