"""A server's adapters as a table for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_multilora.slots.budget import MIB, held
from vllm_multilora.states import NEAREST_FIRST, AdapterState
from vllm_multilora.toolbox.commands.output.text_table import aligned, cut
from vllm_multilora.wording import printable

# What nobody has asked for comes last: those that have failed are to be seen.
_IN_ORDER = [state.value for state in NEAREST_FIRST if state is not AdapterState.ABSENT]
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))
_KERNELS = ("layers", "kind", "rows", "kernels", "reason", "problem")


def table(listing: Mapping[str, Any], *, now: float) -> list[str]:
    """The lines of a table: totals, an adapter a line, and what went wrong below.

    What the server does not show to the holder of a key has no column and no total. Ages count
    from `now`, in Unix time.
    """
    adapters = sorted(listing["data"], key=_order)
    shown = [key for key in _COLUMNS if all(key in adapter for adapter in adapters)]
    headings, are_right, cells = zip(*(_COLUMNS[key] for key in shown), strict=True)
    rows = [
        [cell(adapter[key], now) for key, cell in zip(shown, cells, strict=True)]
        for adapter in adapters
    ]
    right = [number for number, is_right in enumerate(are_right) if is_right]
    lines = [*_totals(listing), "", *aligned([headings, *rows], right=right)]
    if kernels := listing.get("kernels"):  # what workers on a GPU have chosen at start
        rows = [[printable(row.get(key, "")) for key in _KERNELS] for row in kernels]
        headings = (*map(str.upper, _KERNELS[:-1]), "PROBLEM WITH OURS")
        lines += ["", *aligned([headings, *rows])]
    failed = [adapter for adapter in adapters if adapter["last_error"]]
    if failed:
        # A reason may have several lines, one for each thing that is wrong.
        reasons = (f"{adapter['id']}: {adapter['last_error']}" for adapter in failed)
        lines += ["", *(printable(line) for reason in reasons for line in reason.split("\n"))]
    return lines


def _order(adapter: Mapping[str, Any]) -> tuple[int, str]:
    state = adapter["state"]
    return (_IN_ORDER.index(state) if state in _IN_ORDER else len(_IN_ORDER)), adapter["id"]


def _totals(listing: Mapping[str, Any]) -> list[str]:
    slots, cpu = listing.get("slots"), listing.get("cpu")
    lines = []
    if slots is not None:
        lines.append(f"slots        {slots['total'] - slots['free']} of {slots['total']}")
    if cpu is not None:
        keys = ("adapters", "bytes", "adapters_limit", "bytes_limit")
        lines.append(f"host memory  {held(*(cpu[key] for key in keys))}")
    if rates := listing.get("rates"):  # of a watch
        lines.append(
            f"per second   {', '.join(f'{rate:,.1f} {what}' for what, rate in rates.items())}"
        )
    return [*lines, f"registered   {len(listing['data'])}"]


def _text(value: object, now: float) -> str:
    return "" if value is None else printable(str(value))


def _mib(count: float) -> str:
    return f"{count / MIB:.1f}" if count < 10 * MIB else f"{count / MIB:.0f}"


def _age(at: float | None, now: float) -> str:
    if at is None:
        return ""
    age = max(0.0, now - at)
    for seconds, unit in _UNITS:
        if age >= seconds:
            return f"{age / seconds:.0f} {unit} ago"
    return f"{age:.0f} s ago"


_Cell = Callable[[Any, float], str]
_COLUMNS: dict[str, tuple[str, bool, _Cell]] = {
    "id": ("ADAPTER", False, _text),
    "state": ("STATE", False, _text),
    "slot": ("SLOT", True, _text),
    "kind": ("KIND", False, _text),
    "rank": ("RANK", True, _text),
    "bytes": ("MiB", True, lambda count, now: _mib(count) if count else ""),
    "pinned": ("PINNED", False, lambda is_pinned, now: "yes" if is_pinned else ""),
    "requests": ("REQUESTS", True, _text),
    "hits": ("HITS", True, _text),
    "last_used": ("LAST USED", True, _age),
    "path": ("PATH", False, _text),
}
"""By the key of what they show: heading, whether it is right-aligned, and what is in a cell."""


def screen(lines: Sequence[str], *, width: int, height: int) -> str:
    """Lines cut to a terminal, with what clears it before them."""
    shown = list(lines)
    if len(shown) >= height:
        shown = [*shown[: height - 2], f"... {len(shown) - height + 2} more lines"]
    return "\x1b[H\x1b[2J" + "\n".join(cut(line, width) for line in shown) + "\n"
