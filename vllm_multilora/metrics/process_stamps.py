"""Stamps in file names that identify the process that made a file, and whether it still lives.

A stamp is the namespace of process ids, the id, and the time the process started: ids are reused.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_DEAD_STATES = ("Z", "X")


@dataclass(frozen=True)
class ProcessStamp:
    """Which process it was.

    Attributes:
        namespace: The inode of its namespace of process ids; 0 where there is no /proc.
        pid: Its id.
        started: When it started, in clock ticks since the machine did; 0 where there is no /proc.
    """

    namespace: int
    pid: int
    started: int

    @classmethod
    def own(cls) -> ProcessStamp:
        """This process's."""
        pid = os.getpid()
        return cls(_namespace(), pid, start_time(pid) or 0)

    def is_dead(self) -> bool:
        """Whether the process is known to have ended.

        Nothing can be known of processes in another namespace (containers may share `/dev/shm`),
        or where there is no /proc.
        """
        return (
            start_time(os.getpid()) is not None
            and self.namespace == _namespace()
            and start_time(self.pid) != self.started
        )

    def __str__(self) -> str:
        return f"{self.namespace}-{self.pid}-{self.started}"


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except FileNotFoundError:
        return 0


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None: it is dead."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name, in parentheses, may hold anything; the fields are counted after it.
    fields = facts[facts.rindex(b")") + 2 :].split()
    return None if fields[0].decode() in _DEAD_STATES else int(fields[19])
