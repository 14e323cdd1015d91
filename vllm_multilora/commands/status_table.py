"""A server's adapters as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_multilora.commands.table import aligned, counted
from vllm_multilora.states import AdapterState

_HEADER = (
    *("ADAPTER", "STATE", "SLOT", "KIND", "RANK", "MB", "PINNED"),
    *("REQUESTS", "HITS", "LAST USED", "PATH"),
)
_RIGHT = frozenset(map(_HEADER.index, ("SLOT", "RANK", "MB", "REQUESTS", "HITS", "LAST USED")))
_NEAREST_FIRST = tuple(
    state.value
    for state in (
        AdapterState.SLOT,
        AdapterState.HOST,
        AdapterState.READING,
        AdapterState.QUEUED,
        AdapterState.FAILED,
        AdapterState.QUARANTINED,
        AdapterState.ABSENT,
    )
)
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def table(listing: Mapping[str, Any], *, now: float) -> list[str]:
    """The lines of a table: totals, an adapter a line, and what went wrong below.

    Args:
        listing: The answer of `GET /v1/lora_adapters`.
        now: Unix time, from which ages count.
    """
    adapters = sorted(listing["data"], key=_order)
    rows = [_HEADER, *(_row(adapter, now) for adapter in adapters)]
    lines = [*_totals(listing), "", *aligned(rows, right=_RIGHT)]
    failed = [adapter for adapter in adapters if adapter["last_error"]]
    if failed:
        lines += ["", *(f"{adapter['id']}: {adapter['last_error']}" for adapter in failed)]
    return lines


def _order(adapter: Mapping[str, Any]) -> tuple[int, str]:
    state = adapter["state"]
    place = _NEAREST_FIRST.index(state) if state in _NEAREST_FIRST else len(_NEAREST_FIRST)
    return place, adapter["id"]


def _totals(listing: Mapping[str, Any]) -> list[str]:
    slots, cpu = listing["slots"], listing["cpu"]
    used = f"{counted(cpu['adapters'], 'adapter')}, {_mb(cpu['bytes'])} MB"
    limits = []
    if cpu["adapters_limit"] is not None:
        limits.append(counted(cpu["adapters_limit"], "adapter"))
    if cpu["bytes_limit"] is not None:
        limits.append(f"{_mb(cpu['bytes_limit'])} MB")
    return [
        f"slots        {slots['total'] - slots['free']} of {slots['total']}",
        f"host memory  {used}" + (f" of {' and '.join(limits)}" if limits else ""),
        f"registered   {len(listing['data'])}",
    ]


def _row(adapter: Mapping[str, Any], now: float) -> tuple[str, ...]:
    return (
        adapter["id"],
        adapter["state"],
        _text(adapter["slot"]),
        _text(adapter.get("kind")),
        _text(adapter["rank"]),
        _mb(adapter["bytes"]) if adapter["bytes"] else "",
        "yes" if adapter["pinned"] else "",
        str(adapter["requests"]),
        str(adapter["hits"]),
        _age(adapter["last_used"], now),
        _text(adapter["path"]),
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f}" if count < 1e7 else f"{count / 1e6:.0f}"


def _age(at: float | None, now: float) -> str:
    if at is None:
        return ""
    age = max(0.0, now - at)
    for seconds, unit in _UNITS:
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return f"{age:.0f} s ago"


def screen(lines: Sequence[str], *, width: int, height: int) -> str:
    """Lines cut to a terminal, with what clears it before them."""
    shown = list(lines)
    if len(shown) >= height:
        shown = [*shown[: height - 2], f"... {len(shown) - height + 2} more lines"]
    return "\x1b[H\x1b[2J" + "\n".join(line[:width] for line in shown) + "\n"
