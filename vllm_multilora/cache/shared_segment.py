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

from vllm_multilora.errors import MultiLoRAError

logger = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "vllm-multilora-"
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<space>\d+)-(?P<pid>\d+)-(?P<started>\d+)-.+")
_INSTANCE_CHARACTERS = 48
_DEAD_STATES = ("Z", "X")


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
    safe = re.sub(r"[^A-Za-z0-9_.]", "_", instance_id)
    if safe != instance_id or not 0 < len(safe) <= _INSTANCE_CHARACTERS:
        # Different ids stay different where the safe form is the same.
        digest = hashlib.sha256(instance_id.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        safe = f"{safe[:_INSTANCE_CHARACTERS]}-{digest}"
    pid = os.getpid()
    return f"{_PREFIX}{_process_namespace()}-{pid}-{_start_time(pid) or 0}-{safe}"


def remove_stale_segments(folder: Path) -> list[Path]:
    """Removes the segments whose creator is dead.

    Left alone are those of other users, and those made in another namespace of process ids
    (containers may share `/dev/shm`), of whose processes nothing can be known here.

    Returns:
        The files removed.
    """
    if _start_time(os.getpid()) is None:
        return []  # No /proc: nothing can be known of any process.
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
        and int(name["space"]) == _process_namespace()
        and path.lstat().st_uid == os.geteuid()
        and _start_time(int(name["pid"])) != int(name["started"])
    )


def _process_namespace() -> int:
    """The inode of this process's namespace of process ids; 0 where there is no /proc."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except FileNotFoundError:
        return 0


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None: it is dead."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may hold anything; the fields are counted after it.
    fields = facts[facts.rindex(b")") + 2 :].split()
    return None if fields[0].decode() in _DEAD_STATES else int(fields[19])
