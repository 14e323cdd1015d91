"""Tables of configurations in JSON, one file per GPU architecture, checked when read.

A table lists entries for each half; the first one whose limits hold the workload is taken::

    {
      "architecture": "sm_90",
      "shrink": [
        {"max_tokens": 64, "max_width": 8192, "max_rank": 64,
         "config": {"block_m": 16, "block_r": 64, "block_k": 128, "split_k": 8,
                    "num_warps": 4, "num_stages": 3}}
      ],
      "expand": []
    }

`max_tokens`, `max_width`, `max_rank` and `max_slices` may be left out: no limit. Files are looked
for in the folder named by MULTILORA_CONFIG_DIR, then in this package.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from multilora_kernels.configs.model import ExpandConfig, ShrinkConfig, Workload

DIRECTORY_VARIABLE = "MULTILORA_CONFIG_DIR"
_PACKAGED = Path(__file__).parent
_LIMITS = {
    "max_tokens": "tokens",
    "max_width": "width",
    "max_rank": "max_rank",
    "max_slices": "slices",
}

Config = TypeVar("Config", ShrinkConfig, ExpandConfig)


class ConfigTableError(ValueError):
    """A configuration table is not valid; the message names file, entry, value and remedy."""


@dataclass(frozen=True)
class Entry(Generic[Config]):
    """A configuration and the largest workload it is for.

    Attributes:
        limits: (attribute of `Workload`, largest value).
        config: The configuration.
    """

    limits: tuple[tuple[str, int], ...]
    config: Config

    def matches(self, workload: Workload) -> bool:
        return all(getattr(workload, name) <= most for name, most in self.limits)


@dataclass(frozen=True)
class Table:
    """The entries of one architecture, in the order in which they are tried."""

    shrink: tuple[Entry[ShrinkConfig], ...] = ()
    expand: tuple[Entry[ExpandConfig], ...] = ()


def load_table(architecture: str) -> Table:
    """The table of an architecture; empty where there is no file.

    Args:
        architecture: Such as `sm_90` or `gfx942`.

    Raises:
        ConfigTableError: A file is there but cannot be read or is not valid.
    """
    folder = os.environ.get(DIRECTORY_VARIABLE)
    for directory in ([Path(folder)] if folder else []) + [_PACKAGED]:
        path = directory / f"{architecture}.json"
        if path.is_file():
            return _read(path, architecture)
    return Table()


@lru_cache
def _read(path: Path, architecture: str) -> Table:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigTableError(f"{path}: cannot be read as JSON: {error}") from error
    _check_keys(path, "the table", content, {"architecture", "shrink", "expand"}, set())
    if content["architecture"] != architecture:
        raise ConfigTableError(
            f"{path}: architecture must be {architecture!r}, as the file is named, "
            f"found {content['architecture']!r}"
        )
    return Table(
        shrink=_entries(path, "shrink", content["shrink"], ShrinkConfig),
        expand=_entries(path, "expand", content["expand"], ExpandConfig),
    )


def _entries(path: Path, half: str, items: Any, kind: type[Config]) -> tuple[Entry[Config], ...]:
    if not isinstance(items, list):
        raise ConfigTableError(f"{path}: {half} must be a list, found {type(items).__name__}")
    entries = []
    for number, item in enumerate(items):
        where = f"{half}[{number}]"
        _check_keys(path, where, item, {"config"}, set(_LIMITS))
        limits = []
        for key, attribute in _LIMITS.items():
            value = item.get(key)
            if key in item and (type(value) is not int or value < 1):
                raise ConfigTableError(
                    f"{path}: {where}.{key} must be a positive integer, found {value!r}"
                )
            if key in item:
                limits.append((attribute, value))
        values = item["config"]
        _check_keys(path, f"{where}.config", values, {field.name for field in fields(kind)}, set())
        try:
            config = kind(**values)
        except ValueError as error:
            raise ConfigTableError(f"{path}: {where}.config: {error}") from error
        entries.append(Entry(tuple(limits), config))
    return tuple(entries)


def _check_keys(path: Path, where: str, found: Any, required: set[str], optional: set[str]) -> None:
    if not isinstance(found, dict):
        raise ConfigTableError(
            f"{path}: {where} must be a JSON object, found {type(found).__name__}"
        )
    missing, unknown = required - found.keys(), found.keys() - required - optional
    if missing or unknown:
        raise ConfigTableError(
            f"{path}: {where} must have the keys {', '.join(sorted(required))}"
            + (f" and may have {', '.join(sorted(optional))}" if optional else "")
            + f"; missing: {', '.join(sorted(missing)) or 'none'}"
            + f"; unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
