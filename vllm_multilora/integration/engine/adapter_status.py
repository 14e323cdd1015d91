"""What an engine core tells of its adapters, and the answer of `GET /v1/lora_adapters` made of it.

It is asked with a single call, and only when a client asks. It answers with plain mappings, since
vLLM sends nothing else to an API server.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.engine.adapters.adapter_entries import AdapterEntry
from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters
from vllm_multilora.integration.failed_requests import without_folder
from vllm_multilora.states import NEAREST_FIRST, AdapterState

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

METHOD = "multilora_adapter_status"
"""Name under which an engine core gives its report; `AdapterExecutorMixin` answers it."""

REGISTER = "multilora_register"
"""Name under which it registers an adapter for an API server, and says what it has read."""

Report = dict[str, Any]
Row = dict[str, Any]

_NEAREST_FIRST = [state.value for state in NEAREST_FIRST]
_TIERS = {AdapterState.SLOT.value: "gpu", AdapterState.HOST.value: "cpu"}


def engine_report(
    adapters: EngineAdapters, requests: Mapping[int, int], asked: Sequence[int]
) -> Report:
    """One engine's report, and how many seconds it has cost."""
    adapters.poll()
    begun = time.perf_counter()
    known = {entry.number: entry for entry in adapters.known()}
    memory = adapters.observer.host_memory
    contents = adapters.slots.contents
    rows = [
        # Numbers of adapters are no keys of a mapping on vLLM's wire.
        {
            "int_id": number,
            "requests": requests.get(number, 0),
            **_row(adapters, number, known.get(number)),
        }
        for number in sorted({*known, *asked})
    ]
    return {
        "adapters": rows,
        "seconds": time.perf_counter() - begun,
        "slots": {"total": len(contents), "free": contents.count(None)},
        "store": adapters.store_address,
        "kernels": adapters.observer.kernels,
        "cpu": {
            "adapters": memory.adapters if memory else 0,
            "bytes": memory.bytes if memory else 0,
            "bytes_limit": memory.bytes_limit if memory else None,
            "adapters_limit": memory.adapters_limit if memory else None,
        },
    }


def _row(adapters: EngineAdapters, number: int, entry: AdapterEntry | None) -> Row:
    request, pack = (None, None) if entry is None else (entry.request, entry.pack)
    blend = None if entry is None else entry.blend
    use, failure = adapters.observer.usage.of(number), adapters.failure(number)
    last_error = failure.message if failure else use.last_error
    if blend is not None and request is not None and last_error is not None:
        last_error = without_folder(last_error, request)  # which is not its own
    state = adapters.state(number)
    if state is AdapterState.ABSENT and use.last_error is not None:
        state = AdapterState.FAILED
    return {
        "name": request.lora_name if request else None,
        "path": request.lora_path if request and blend is None else None,
        "parts": {part.name: part.weight for part in blend.parts} if blend else None,
        "state": state.value,
        "slot": adapters.slots.slot_of(number) if state is AdapterState.SLOT else None,
        "kind": pack.kind if pack else None,
        "rank": use.rank,
        "digest": pack.digest if pack else None,
        "loaded": entry.loaded if entry else None,
        "bytes": pack.nbytes if pack and entry and entry.in_host else 0,
        "pinned": number in adapters.slots.pins,
        "hits": use.gpu_hits,
        "loads": use.loads,
        "last_used": use.last_used,
        "last_error": last_error,
    }


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

    `refused` says why versions were refused that the engines know nothing of, by number.
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
        **{key: best and best[key] for key in ("slot", "kind", "parts", "digest", "loaded")},
        "rank": _most(rows, "rank"),
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
