"""Which of the instruction sets that the C code is built for runs on this processor."""

from __future__ import annotations

import logging
import os
import platform
from functools import lru_cache
from pathlib import Path

from multilora_kernels.native.builds import (
    X86_MACHINES,
    InstructionSet,
    NativeUnavailableError,
    instruction_sets,
)

logger = logging.getLogger(__name__)

SETTING = "MULTILORA_INSTRUCTIONS"
CPUINFO = Path("/proc/cpuinfo")


def chosen_set() -> InstructionSet:
    """The best set of this processor, or the one in `MULTILORA_INSTRUCTIONS`.

    Raises:
        NativeUnavailableError: It names none, or one that this processor lacks.
    """
    sets = instruction_sets(platform.machine())
    fitting = [each for each in sets if each.needs <= _features()]
    requested = os.environ.get(SETTING)
    if not requested:
        return fitting[0]
    for each in fitting:
        if each.name == requested:
            return each
    missing = {each.name: each.needs - _features() for each in sets}.get(requested)
    why = f"needs {', '.join(sorted(missing))}, which it lacks" if missing else "does not exist"
    raise NativeUnavailableError(
        f"{SETTING}={requested}: on this processor it {why}; one of "
        f"{', '.join(each.name for each in fitting)} runs"
    )


@lru_cache(maxsize=1)
def _features() -> frozenset[str]:
    """What an x86 processor has and Linux lets programs use, as in /proc/cpuinfo."""
    if platform.machine() not in X86_MACHINES:
        return frozenset()
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError as error:
        logger.warning(
            "%s cannot be read (%s): native kernels use no more than every x86-64 processor has",
            CPUINFO,
            error,
        )
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
