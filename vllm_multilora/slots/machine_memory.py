"""How much memory this process may use: the machine's, its container's, or its service's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def machine_memory(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Bytes of memory that this machine has, or that control groups leave to this process.

    systemd's `MemoryMax` and a container's limit are limits of a control group, this process's own
    or one around it.

    Args:
        groups: Where the control groups are mounted.
        own: Tells which this process is in.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _limits(groups, own):
        try:
            memory = min(memory, int(limit.read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return memory


def _limits(groups: Path, own: Path) -> Iterator[Path]:
    """The files of all limits, of control groups of version 2 and of version 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    # A container may see its own group as the root, whatever the path says.
    for line in ("0::/", "0:memory:/", *lines):
        _, kinds, path = line.split(":", 2) if line.count(":") >= 2 else ("", "-", "")
        if kinds and "memory" not in kinds.split(","):
            continue
        group = PurePosixPath(path.lstrip("/"))
        if ".." in group.parts:  # outside of what this container may see
            continue
        for folder in (group, *group.parents):
            if kinds:
                yield groups / "memory" / folder / "memory.limit_in_bytes"
            else:
                yield groups / folder / "memory.max"
