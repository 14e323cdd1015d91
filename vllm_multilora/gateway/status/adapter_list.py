"""Puts together what engines tell of adapters and what an API server has names for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.engine.adapter_status import Report, Row
from vllm_multilora.states import NEAREST_FIRST, AdapterState

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

_NEAREST_FIRST = [state.value for state in NEAREST_FIRST]
_TIERS = {AdapterState.SLOT.value: "gpu", AdapterState.HOST.value: "cpu"}


def listing(
    reports: Sequence[Report],
    registered: Iterable[LoRARequest],
    refused: Mapping[int, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The route's answer.

    Adapters that the server has names for, and those that requests brought along without
    registration, by name; an old version that requests still end on is left out. With data
    parallelism an adapter's state is that of the engine that has it nearest to serving, counts add
    up, bytes do where engines have different stores, and `engines` says what each engine has.
    `kernels` is there where an engine's workers have chosen kernels: the first engine's.

    Args:
        reports: Of all engines.
        registered: The server's adapters.
        refused: Why versions of them were refused that the engines know nothing of, by number.
    """
    rows = {lora.lora_int_id: {"id": lora.lora_name, "path": lora.lora_path} for lora in registered}
    served = {row["id"] for row in rows.values()}
    by_id: dict[int, list[tuple[int, Row]]] = {}
    for engine, report in enumerate(reports):
        for row in report["adapters"]:
            by_id.setdefault(row["int_id"], []).append((engine, row))
            if row["name"] is not None and row["name"] not in served:
                rows.setdefault(row["int_id"], {"id": row["name"], "path": row["path"]})
    data = [
        {
            "id": known["id"],
            "object": "lora_adapter",
            "int_id": lora_id,
            "path": known["path"],
            **_merge_engines(by_id.get(lora_id, []), [report["store"] for report in reports]),
        }
        for lora_id, known in rows.items()
    ]
    for row in data:
        if row["int_id"] in refused:
            row["last_error"] = refused[row["int_id"]]
            if row["state"] == AdapterState.ABSENT.value:
                row["state"] = AdapterState.FAILED.value
    kernels = reports[0].get("kernels")
    return {
        "object": "list",
        "data": sorted(data, key=lambda row: (row["id"], row["int_id"])),
        "slots": _totals([report["slots"] for report in reports]),
        # Engines of one machine share their store, and each tells of all that it holds.
        "cpu": _totals(list({report["store"]: report["cpu"] for report in reports}.values())),
        **({"kernels": kernels} if kernels else {}),
    }


def _merge_engines(found: Sequence[tuple[int, Row]], stores: Sequence[str]) -> Row:
    rows = [row for _, row in found]
    best = min(rows, key=lambda row: _NEAREST_FIRST.index(row["state"]), default=None)
    state = best["state"] if best else AdapterState.ABSENT.value
    merged: Row = {
        "state": state,
        "tier": _TIERS.get(state, "disk"),
        "slot": best["slot"] if best else None,
        "kind": best["kind"] if best else None,
        "parts": best["parts"] if best else None,
        "rank": _most(rows, "rank"),
        "digest": best["digest"] if best else None,
        "loaded": best["loaded"] if best else None,
        "bytes": sum({stores[engine]: row["bytes"] for engine, row in found}.values()),
        "pinned": any(row["pinned"] for row in rows),
        "requests": sum(row["requests"] for row in rows),
        "hits": sum(row["hits"] for row in rows),
        "loads": sum(row["loads"] for row in rows),
        "last_used": _most(rows, "last_used"),
        "last_error": _first(rows, "last_error"),
    }
    if len(stores) > 1:
        merged["engines"] = [
            {"engine": engine, **{key: row[key] for key in ("state", "slot", "digest")}}
            for engine, row in found
        ]
    return merged


def _totals(parts: Sequence[Mapping[str, int | None]]) -> dict[str, int | None]:
    return {key: _sum(part[key] for part in parts) for key in parts[0]}


def _sum(values: Iterable[int | None]) -> int | None:
    """The sum; None, no limit, where one has none."""
    found = list(values)
    return None if None in found else sum(value for value in found if value is not None)


def _most(rows: Sequence[Row], key: str) -> Any:
    return max((row[key] for row in rows if row[key] is not None), default=None)


def _first(rows: Sequence[Row], key: str) -> Any:
    return next((row[key] for row in rows if row[key] is not None), None)
