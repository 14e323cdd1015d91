"""The folder in which the processes of an engine keep their values.

Whoever starts the engine makes it before, and removes it at its end; what a crash leaves, the next
start removes. Its name tells the instance, by which the engine's processes find it. Its maker has
it locked for as long as it lives: that is known in every container that shares the file system,
where process ids are not.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX, _SUFFIX = "multilora-metrics-", ".engine"
_INSTANCE_CHARACTERS = 48
_MAKING_S = 60.0  # far longer than it takes to lock a folder and give it its name

_SHARED_TRIES = 100  # a millisecond apart: who writes is done sooner, or is frozen

_locks: dict[Path, int] = {}
"""Descriptors that lock the folders which this process has made, by folder."""


def parent_folder() -> Path:
    """Where such folders are: where vLLM keeps its own values if it does, else shared memory."""
    multiprocess = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if multiprocess:
        return Path(multiprocess)
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def create_folder(instance_id: str, parent: Path) -> Path:
    """Makes an instance's folder, which only this user may enter; raises `OSError`."""
    _remove_stale(parent)
    folder = _named(instance_id, parent)
    # It has its name when it is locked: nobody may take it for what is left of the dead.
    made = Path(tempfile.mkdtemp(_SUFFIX, f".{_PREFIX}", parent))
    descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        made.rename(folder)
    except OSError:
        os.close(descriptor)
        made.rmdir()
        raise
    _locks[folder] = descriptor
    return folder


def find_folder(instance_id: str, parent: Path) -> Path | None:
    """An instance's folder; None where there is none: metrics are off, or it is elsewhere."""
    folder = _named(instance_id, parent)
    return folder if _is_own(folder) else None


@contextlib.contextmanager
def locked(folder: Path, *, exclusively: bool) -> Iterator[None]:
    """Holds a folder's lock: nobody is to read in the midst of a change to several files.

    Who changes files holds it `exclusively`; readers wait for those, but not for long.

    Raises:
        BlockingIOError: The lock is wanted exclusively, and somebody has it.
        OSError: There is no folder.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if exclusively:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            for _ in range(_SHARED_TRIES):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                time.sleep(0.001)
        yield
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it; does nothing where it is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    if (descriptor := _locks.pop(folder, None)) is not None:
        os.close(descriptor)


def _remove_stale(parent: Path) -> None:
    for folder in sorted((*parent.glob(f"{_PREFIX}*{_SUFFIX}"), *_unfinished(parent))):
        if _is_own(folder) and not _is_locked(folder):
            remove_folder(folder)
            logger.info("Removed the metrics of a server that is dead: %s", folder)


def _unfinished(parent: Path) -> Iterator[Path]:
    """Folders whose makers should have locked and named them long ago."""
    for folder in parent.glob(f".{_PREFIX}*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.lstat().st_mtime > _MAKING_S:
                yield folder


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _named(instance_id: str, parent: Path) -> Path:
    """An instance's folder; those of different instances stay different."""
    safe = re.sub(r"[^A-Za-z0-9_.]", "_", instance_id)
    if safe != instance_id or not 0 < len(safe) <= _INSTANCE_CHARACTERS:
        digest = hashlib.sha256(instance_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        safe = f"{safe[:_INSTANCE_CHARACTERS]}-{digest}"
    return parent / f"{_PREFIX}{safe}{_SUFFIX}"


def _is_own(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and facts.st_uid == os.geteuid()
