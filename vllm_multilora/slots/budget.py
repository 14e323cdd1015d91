"""How much host memory the CPU tier may take."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vllm_multilora.errors import ConfigError
from vllm_multilora.wording import counted

GIB = 2**30
MIB = 2**20
_KIB = 2**10


def readable(size: float) -> str:
    """Bytes in GiB, or in smaller units where GiB would hide them."""
    if size >= GIB // 10:
        return f"{size / GIB:.2f} GiB"
    if size >= MIB // 10:
        return f"{size / MIB:.1f} MiB"
    return f"{size / _KIB:.1f} KiB"


def enough_gib(size: int) -> str:
    """Bytes in GiB as a setting, with two decimals that are not too few."""
    return f"{math.ceil(size / GIB * 100) / 100:.2f}"


def _limits(adapters: int | None, size: float | None) -> str:
    """Limits in words; empty where there is none."""
    given = [] if adapters is None else [counted(adapters, "adapter")]
    given += [] if size is None else [readable(size)]
    return " and ".join(given)


def held(adapters: int, size: float, most_adapters: int | None, most_bytes: float | None) -> str:
    """What host memory holds, such as `1 adapter, 80.1 MiB of 1.86 GiB`; None: no such limit."""
    limits = _limits(most_adapters, most_bytes)
    return f"{counted(adapters, 'adapter')}, {readable(size)}" + (f" of {limits}" if limits else "")


@dataclass(frozen=True)
class CpuBudget:
    """Limits of the CPU tier; each holds on its own, None is no limit.

    They cover everything that is in host memory: adapters that are kept, that wait to be copied
    into slots, and that are being read.

    Attributes:
        adapters: Most adapters in the tier (vLLM's `--max-cpu-loras`).
        bytes: Most bytes of packed adapters in the tier.

    Raises:
        ConfigError: A limit is no positive integer.
    """

    adapters: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("adapters", self.adapters), ("bytes", self.bytes)):
            if limit is None:
                continue
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
                raise ConfigError(
                    f"the CPU budget in {name} must be a positive integer or None (no limit), "
                    f"got {limit!r}"
                )

    def fits(self, adapters: int, size: int) -> bool:
        """Whether that many adapters with `size` bytes in all keep within the limits."""
        return (self.adapters is None or adapters <= self.adapters) and (
            self.bytes is None or size <= self.bytes
        )

    def __str__(self) -> str:
        return _limits(self.adapters, self.bytes) or "no limit"


_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def machine_memory(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """Bytes of memory that this machine has, or that control groups leave to this process.

    systemd's `MemoryMax` and a container's limit are limits of a control group, this process's own
    or one around it.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _group_limits(groups, own):
        try:
            memory = min(memory, int(limit.read_text()))
        except (OSError, ValueError):  # no such control group, or "max"
            continue
    return memory


def _group_limits(groups: Path, own: Path) -> Iterator[Path]:
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
