"""Tables of configurations in JSON, one file per GPU architecture, checked when read.

A table lists entries for each half; the first one whose limits hold the workload is taken::

    {
      "architecture": "sm_90",
      "origin": {"card": "...", "date": "...", "driver": "...", "torch": "...", "triton": "...",
                 "command": "..."},
      "shrink": [
        {"max_tokens": 16, "max_width": 8192, "max_rank": 64, "config": "default"},
        {"max_tokens": 64, "max_width": 8192, "max_rank": 64, "gain": 1.17,
         "config": {"block_m": 16, "block_r": 64, "block_k": 128, "split_k": 8,
                    "num_warps": 4, "num_stages": 3}}
      ],
      "expand": []
    }

A shrink's configuration may also have `vector_rows` and `early`. The limits `max_tokens`,
`max_width`, `max_rank`, `max_slices` and `max_item_size` may be left out: no limit. The
configuration "default" is the computed default of the workload: it keeps a wider entry further down
from being taken where measuring found nothing better. `origin` says what the table was measured on,
and `gain` how many times faster than the default an entry was; both are for readers and may be left
out.

Files are looked for in the folder named by MULTILORA_CONFIG_DIR, then in this package.
`python -m tools.kernels.tune` writes them.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import MISSING, asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from multilora_kernels.configs.config_facts import ExpandConfig, ShrinkConfig, Workload

DIRECTORY_VARIABLE = "MULTILORA_CONFIG_DIR"
_PACKAGED = Path(__file__).parent
_LIMITS = {
    "max_tokens": "tokens",
    "max_width": "width",
    "max_rank": "max_rank",
    "max_slices": "slices",
    "max_item_size": "item_size",
}
_DEFAULT = "default"

Config = TypeVar("Config", ShrinkConfig, ExpandConfig)


class ConfigTableError(ValueError):
    """A configuration table is not valid; the message names file, entry, value and remedy."""


@dataclass(frozen=True)
class TableEntry(Generic[Config]):
    """A configuration and the largest workload it is for.

    Attributes:
        limits: (attribute of `Workload`, largest value).
        config: The configuration; None: the computed default.
        gain: How many times faster than the default it was when it was measured, if it was.
    """

    limits: tuple[tuple[str, int], ...]
    config: Config | None
    gain: float | None = None

    def matches(self, workload: Workload) -> bool:
        return all(getattr(workload, name) <= most for name, most in self.limits)


@dataclass(frozen=True)
class Origin:
    """What a table was measured on and with."""

    card: str
    date: str
    driver: str
    torch: str
    triton: str
    command: str


@dataclass(frozen=True)
class Table:
    """The entries of one architecture, in the order in which they are tried."""

    shrink: tuple[TableEntry[ShrinkConfig], ...] = ()
    expand: tuple[TableEntry[ExpandConfig], ...] = ()
    origin: Origin | None = None


def table_path(architecture: str) -> Path | None:
    """The file with the table of an architecture; None where there is no file."""
    folder = os.environ.get(DIRECTORY_VARIABLE)
    for directory in ([Path(folder)] if folder else []) + [_PACKAGED]:
        path = directory / f"{architecture}.json"
        if path.is_file():
            return path
    return None


def load_table(architecture: str) -> Table:
    """The table of an architecture; empty where there is no file.

    Args:
        architecture: Such as `sm_90` or `gfx942`.

    Raises:
        ConfigTableError: A file is there but cannot be read or is not valid.
    """
    path = table_path(architecture)
    return Table() if path is None else _read(path, architecture)


def write_table(path: Path, architecture: str, table: Table) -> None:
    """Writes a table that `load_table` reads; a file of that name is replaced at once."""
    content: dict[str, Any] = {"architecture": architecture}
    if table.origin is not None:
        content["origin"] = asdict(table.origin)
    for half, entries in (("shrink", table.shrink), ("expand", table.expand)):
        content[half] = [_as_json(entry) for entry in entries]
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _as_json(entry: TableEntry[Any]) -> dict[str, Any]:
    limits = dict(entry.limits)
    item: dict[str, Any] = {
        key: limits[attribute] for key, attribute in _LIMITS.items() if attribute in limits
    }
    if entry.gain is not None:
        item["gain"] = entry.gain
    item["config"] = _DEFAULT if entry.config is None else asdict(entry.config)
    return item


@lru_cache
def _read(path: Path, architecture: str) -> Table:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigTableError(f"{path}: cannot be read as JSON: {error}") from error
    _check_keys(path, "the table", content, {"architecture", "shrink", "expand"}, {"origin"})
    if content["architecture"] != architecture:
        raise ConfigTableError(
            f"{path}: architecture must be {architecture!r}, as the file is named, "
            f"found {content['architecture']!r}"
        )
    return Table(
        shrink=_entries(path, "shrink", content["shrink"], ShrinkConfig),
        expand=_entries(path, "expand", content["expand"], ExpandConfig),
        origin=_origin(path, content["origin"]) if "origin" in content else None,
    )


def _origin(path: Path, item: Any) -> Origin:
    _check_keys(path, "origin", item, {field.name for field in fields(Origin)}, set())
    for key, value in item.items():
        if not isinstance(value, str):
            raise ConfigTableError(f"{path}: origin.{key} must be a string, found {value!r}")
    return Origin(**item)


def _entries(
    path: Path, half: str, items: Any, kind: type[Config]
) -> tuple[TableEntry[Config], ...]:
    if not isinstance(items, list):
        raise ConfigTableError(f"{path}: {half} must be a list, found {type(items).__name__}")
    entries = []
    for number, item in enumerate(items):
        where = f"{half}[{number}]"
        _check_keys(path, where, item, {"config"}, {*_LIMITS, "gain"})
        limits = []
        for key, attribute in _LIMITS.items():
            value = item.get(key)
            if key in item and (type(value) is not int or value < 1):
                raise ConfigTableError(
                    f"{path}: {where}.{key} must be a positive integer, found {value!r}"
                )
            if key in item:
                limits.append((attribute, value))
        gain = item.get("gain")
        if "gain" in item and (type(gain) not in (int, float) or not 0 < gain < math.inf):
            raise ConfigTableError(
                f"{path}: {where}.gain must be a positive number, found {gain!r}"
            )
        config = _config(path, f"{where}.config", item["config"], kind)
        entries.append(TableEntry(tuple(limits), config, gain))
    return tuple(entries)


def _config(path: Path, where: str, values: Any, kind: type[Config]) -> Config | None:
    if values == _DEFAULT:
        return None
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    _check_keys(path, where, values, {field.name for field in fields(kind)} - optional, optional)
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigTableError(f"{path}: {where}: {error}") from error


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
