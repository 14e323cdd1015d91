"""Memory shared by the processes of an engine, under a name that no crash leaves behind.

A segment is a file in `/dev/shm`, mapped. Its name says which process made it: the namespace of
process ids, the id, and the time that process started (ids are reused). The creator removes the
name as soon as everybody has the segment mapped; the memory lives on until the last has ended. Of
an engine that died before that, the next one that starts removes the name.

`multiprocessing.shared_memory` is not used: its resource tracker unlinks segments that other
processes still use, and warns of those that it does not own.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
import stat
import tempfile
from pathlib import Path

from vllm_multilora.cache.process_stamps import ProcessStamp
from vllm_multilora.errors import MultiLoRAError

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "vllm-multilora-"
_NAME = re.compile(re.escape(_PREFIX) + ProcessStamp.PATTERN + r"-.+")
_INSTANCE_CHARACTERS = 48


class SharedSegmentError(MultiLoRAError, OSError):
    """A shared segment cannot be made, or is not what its name promises."""


def segment_folder() -> Path:
    """Where segments live: `/dev/shm`, or the folder for temporary files where there is none."""
    return _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())


def create_segment(instance_id: str, size: int, folder: Path) -> tuple[Path, mmap.mmap]:
    """Makes a segment of zeros that only this user may open.

    Args:
        instance_id: What tells this engine's segment from others of this process.
        size: Bytes.
        folder: Where; see `segment_folder`.

    Returns:
        The file, which other processes open, and the mapping.

    Raises:
        SharedSegmentError: It exists already, there is no room, or the folder cannot be written.
    """
    path = folder / segment_name(instance_id)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError as error:
        raise SharedSegmentError(
            f"{path} exists: this process has a segment for instance {instance_id!r} already; "
            "give each engine its own instance id"
        ) from error
    except OSError as error:
        raise SharedSegmentError(f"{path} cannot be created: {error.strerror}") from error
    try:
        # Reserved now: a full file system would otherwise kill whoever first writes to a page.
        os.posix_fallocate(descriptor, 0, size)
        return path, mmap.mmap(descriptor, size)
    except OSError as error:
        path.unlink()
        raise SharedSegmentError(
            f"{folder} has no room for a shared segment of {size} bytes ({error.strerror}); "
            "make it larger (docker run --shm-size)"
        ) from error
    finally:
        os.close(descriptor)


def open_segment(path: Path) -> mmap.mmap:
    """Maps a segment that another process of this user made.

    Raises:
        SharedSegmentError: There is no such file, or it is not a regular file of this user.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SharedSegmentError(
            f"{path} cannot be opened: {error.strerror}; the engine that made it has ended, has "
            "sealed it already, or runs on another machine"
        ) from error
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or not facts.st_size:
            raise SharedSegmentError(
                f"{path} must be a regular file of user {os.geteuid()} that is not empty, found "
                f"mode {stat.filemode(facts.st_mode)}, user {facts.st_uid}, {facts.st_size} bytes"
            )
        return mmap.mmap(descriptor, facts.st_size)
    finally:
        os.close(descriptor)


def segment_name(instance_id: str) -> str:
    """The file name of this process's segment for an instance."""
    return f"{_PREFIX}{ProcessStamp.own()}-{file_name_part(instance_id)}"


def file_name_part(instance_id: str) -> str:
    """An instance's id as a part of a file's name; different ids stay different."""
    safe = re.sub(r"[^A-Za-z0-9_.]", "_", instance_id)
    if safe != instance_id or not 0 < len(safe) <= _INSTANCE_CHARACTERS:
        digest = hashlib.sha256(instance_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        safe = f"{safe[:_INSTANCE_CHARACTERS]}-{digest}"
    return safe


def remove_stale_segments(folder: Path) -> list[Path]:
    """Removes the segments whose creator is dead.

    Left alone are those of other users, and those made in another namespace of process ids
    (containers may share `/dev/shm`), of whose processes nothing can be known here.

    Returns:
        The files removed.
    """
    removed = []
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        try:
            if _is_stale(path):
                path.unlink()
                removed.append(path)
        except FileNotFoundError:
            continue  # Another engine that starts at the same time was quicker.
        except OSError as error:
            logger.warning("Leaving %s alone: %s", path, error)
    if removed:
        logger.info("Removed what dead engines left: %s", ", ".join(map(str, removed)))
    return removed


def _is_stale(path: Path) -> bool:
    name = _NAME.fullmatch(path.name)
    return (
        name is not None
        and path.lstat().st_uid == os.geteuid()
        and ProcessStamp(int(name["space"]), int(name["pid"]), int(name["started"])).is_dead()
    )
