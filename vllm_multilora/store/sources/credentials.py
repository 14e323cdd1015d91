"""Credentials of sources, on their way from a server to the fetching child.

Jobs read strangers' files, and have what their store has: so neither the store nor its jobs have
credentials in their environment. They lie in a file in memory, which the store hands on without
looking into it, and which jobs close.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

DESCRIPTOR_VARIABLE = "MULTILORA_CREDENTIALS_FD"
"""Variable of a store: the number of the descriptor of the file in memory."""

MAX_BYTES = 1 << 20

# HF_TOKEN stays with the store: --multilora-allow-hub has jobs download before they are confined.
_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_")
_LINE = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)")


def left_out_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a store may have."""
    return {name: text for name, text in environment.items() if not name.startswith(_PREFIXES)}


@contextmanager
def handed_over(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Variables for a store that is started meanwhile and inherits the descriptor they name."""
    found = {name: text for name, text in environment.items() if name.startswith(_PREFIXES)}
    if not found or not hasattr(os, "memfd_create"):
        yield {}
        return
    descriptor = os.memfd_create("source-credentials", 0)  # which programs inherit
    try:
        os.write(descriptor, json.dumps(found).encode())
        yield {DESCRIPTOR_VARIABLE: str(descriptor)}
    finally:
        os.close(descriptor)


def handed_descriptors(environment: Mapping[str, str]) -> tuple[int, ...]:
    """The descriptor of the file in memory, where there is one."""
    number = environment.get(DESCRIPTOR_VARIABLE, "")
    return (int(number),) if number.isdigit() else ()


def read_handed(descriptors: tuple[int, ...]) -> dict[str, str]:
    """The variables in the file in memory."""
    found: dict[str, str] = {}
    for descriptor in descriptors:
        # At its beginning: processes that share a descriptor share its position.
        found |= json.loads(os.pread(descriptor, MAX_BYTES, 0))
    return found


def read_file(path: str) -> dict[str, str]:
    """The variables in a file of lines such as `AWS_SECRET_ACCESS_KEY=...`.

    Raises:
        ValueError: A line is no assignment; the line's number is said, and nothing of its text.
        OSError: It cannot be read.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if (match := _LINE.fullmatch(text)) is None:
            raise ValueError(f"line {number} is not of the form NAME=value")
        value = match[2].strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        found[match[1]] = value
    return found
