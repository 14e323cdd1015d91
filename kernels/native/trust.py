"""Whether a file or folder may hold code that this process loads."""

from __future__ import annotations

import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: Path) -> str:
    """Why others could have put something of their own at a path; empty if they could not.

    The path itself must belong to this user or root, and be writable for nobody else. The
    folders above it must belong to them too, and not be writable for everybody, unless their
    sticky bit keeps everybody from renaming what is not theirs.

    Raises:
        OSError: There is no such path, or it may not be looked at.
    """
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to user {status.st_uid}"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"{path} is writable for others (mode {stat.S_IMODE(status.st_mode):o})"
    for folder in Path(os.path.realpath(path)).parents:
        status = folder.stat()
        if status.st_uid not in (os.geteuid(), 0):
            return f"{folder}, in which {path} lies, belongs to user {status.st_uid}"
        if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            return f"{folder}, in which {path} lies, is writable for everybody"
    return ""
