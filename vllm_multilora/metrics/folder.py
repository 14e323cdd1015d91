"""The folder in which the processes of an engine keep their values.

Whoever starts the engine makes it before, and removes it at its end; what a crash leaves, the next
start removes. Its name tells the instance, by which the engine's processes find it, and the
process that made it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

from vllm_multilora.metrics.process_stamps import ProcessStamp

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "multilora-metrics-"
_INSTANCE_CHARACTERS = 48
_NAME = re.compile(re.escape(_PREFIX) + ProcessStamp.PATTERN + r"-.+")


def parent_folder() -> Path:
    """Where such folders are: where vLLM keeps its own values if it does, else shared memory."""
    multiprocess = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if multiprocess:
        return Path(multiprocess)
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def create_folder(instance_id: str, parent: Path) -> Path:
    """Makes an instance's folder, which only this user may enter.

    Raises:
        OSError: It cannot be made.
    """
    _remove_stale(parent)
    folder = parent / f"{_PREFIX}{ProcessStamp.own()}-{_file_name_part(instance_id)}"
    folder.mkdir(mode=0o700)
    return folder


def find_folder(instance_id: str, parent: Path) -> Path | None:
    """An instance's folder; None where there is none: metrics are off, or it is elsewhere."""
    found = parent.glob(f"{_PREFIX}*-{_file_name_part(instance_id)}")
    return next((folder for folder in found if _is_own(folder)), None)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it; does nothing where it is gone."""
    shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for folder in sorted(parent.glob(f"{_PREFIX}*")):
        name = _NAME.fullmatch(folder.name)
        if name is None or not _is_own(folder):
            continue
        if ProcessStamp(int(name["space"]), int(name["pid"]), int(name["started"])).is_dead():
            remove_folder(folder)
            logger.info("Removed the metrics of a server that is dead: %s", folder)


def _is_own(folder: Path) -> bool:
    try:
        facts = folder.lstat()
    except OSError:
        return False
    return folder.is_dir() and not folder.is_symlink() and facts.st_uid == os.geteuid()


def _file_name_part(instance_id: str) -> str:
    """An instance's id as a part of a file's name; different ids stay different."""
    safe = re.sub(r"[^A-Za-z0-9_.]", "_", instance_id)
    if safe != instance_id or not 0 < len(safe) <= _INSTANCE_CHARACTERS:
        digest = hashlib.sha256(instance_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        safe = f"{safe[:_INSTANCE_CHARACTERS]}-{digest}"
    return safe
