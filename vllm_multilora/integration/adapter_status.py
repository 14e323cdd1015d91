"""What every adapter is doing, put together for `GET /v1/lora_adapters`.

Workers tell of their tiers, the engine core of its requests, the API server of its names. Each
process asks the one below with one call, only when a client asks, and passes plain mappings on:
vLLM sends nothing else between engine core and API server.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_multilora.cache.load_queue import LoadState
from vllm_multilora.cache.states import AdapterState

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.adapter_tiers import AdapterTiers

METHOD = "multilora_adapter_status"
"""Name under which an engine core gives its report; see the ledger's `adapter-status`."""

STATES = ("failed", "disk", "loading", "cpu", "gpu")
"""States of an adapter, the nearest to serving last."""

Report = dict[str, Any]
Row = dict[str, Any]


# In a worker


def worker_report(worker: Any, asked: Sequence[int]) -> Report:
    """A worker's adapters and tiers; sent to the workers by the engine core.

    Args:
        worker: vLLM's worker; its LoRA manager is ours.
        asked: Adapters to tell of even if the worker does not know them (any more).
    """
    tiers: AdapterTiers = worker.model_runner.lora_manager.tiers
    cache = tiers.cache
    return {
        "adapters": {
            lora_id: _worker_row(tiers, lora_id) for lora_id in sorted({*cache.known, *asked})
        },
        "slots": {"total": len(cache.slots), "free": cache.slots.count(None)},
        "cpu": {
            "adapters": len(cache.cpu_adapters),
            "bytes": cache.cpu_bytes,
            "bytes_limit": cache.budget.bytes,
            "adapters_limit": cache.budget.adapters,
        },
    }


def _worker_row(tiers: AdapterTiers, lora_id: int) -> Row:
    cache, use = tiers.cache, tiers.usage.of(lora_id)
    request = tiers.request(lora_id)
    return {
        "name": request.lora_name if request else None,
        "path": request.lora_path if request else None,
        "state": _state(tiers, lora_id, use.last_error is not None),
        "slot": cache.slot_of(lora_id),
        "rank": use.rank,
        "bytes": cache.size(lora_id) or 0,
        "pinned": lora_id in cache.pinned,
        "hits": use.gpu_hits,
        "loads": use.loads,
        "last_used": use.last_used,
        "last_error": use.last_error.message if use.last_error else None,
    }


def _state(tiers: AdapterTiers, lora_id: int, has_failed: bool) -> str:
    state = tiers.cache.state(lora_id)
    if state in (AdapterState.CPU, AdapterState.GPU):
        return state.value
    loading = tiers.loader.state(lora_id)
    if loading in (LoadState.QUEUED, LoadState.LOADING, LoadState.STAGED):
        return "loading"
    return "failed" if has_failed or loading is LoadState.FAILED else "disk"


# In the engine core


def engine_report(engine_core: Any, asked: Sequence[int]) -> list[Report]:
    """One engine's report, as an answer to `collective_rpc`; empty where stock vLLM runs."""
    from vllm_multilora.integration.engine_core import gate_of

    if gate_of(engine_core) is None:
        return []
    reports = engine_core.model_executor.collective_rpc(worker_report, args=(list(asked),))
    return [merge_workers(reports, getattr(engine_core.scheduler, "adapter_requests", {}))]


def merge_workers(reports: Sequence[Report], requests: Mapping[int, int]) -> Report:
    """One engine's report from its workers': they share every adapter, and decide alike.

    An adapter is as far as its slowest worker; bytes add up.

    Args:
        reports: Of all workers, in the order of their ranks.
        requests: Requests accepted by adapter.
    """
    first = reports[0]
    cpu = [report["cpu"] for report in reports]
    return {
        # Numbers of adapters are no keys of a mapping on vLLM's wire.
        "adapters": [
            {
                "int_id": lora_id,
                **_merge_ranks([report["adapters"][lora_id] for report in reports]),
                "requests": requests.get(lora_id, 0),
            }
            for lora_id in first["adapters"]
            if all(lora_id in report["adapters"] for report in reports)
        ],
        "slots": first["slots"],
        "cpu": {
            "adapters": max(tier["adapters"] for tier in cpu),
            "bytes": sum(tier["bytes"] for tier in cpu),
            "bytes_limit": _sum(tier["bytes_limit"] for tier in cpu),
            "adapters_limit": first["cpu"]["adapters_limit"],
        },
    }


def _merge_ranks(rows: Sequence[Row]) -> Row:
    slowest = min(rows, key=lambda row: STATES.index(row["state"]))
    return {
        **rows[0],
        "state": slowest["state"],
        "slot": slowest["slot"],
        "bytes": sum(row["bytes"] for row in rows),
        "rank": _most(rows, "rank"),
        "last_error": _first(rows, "last_error"),
    }


# In the API server


def listing(reports: Sequence[Report], registered: Iterable[LoRARequest]) -> dict[str, Any]:
    """The route's answer.

    Adapters that the server has names for, and those that requests brought along without
    registration, by name; an old version that requests still end on is left out. With data
    parallelism an adapter's state is that of the engine that has it nearest to serving, counts
    and bytes add up, and `engines` says what each engine has.

    Args:
        reports: Of all engines.
        registered: The server's adapters.
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
            **_merge_engines(by_id.get(lora_id, []), several=len(reports) > 1),
        }
        for lora_id, known in rows.items()
    ]
    return {
        "object": "list",
        "data": sorted(data, key=lambda row: (row["id"], row["int_id"])),
        "slots": _totals([report["slots"] for report in reports]),
        "cpu": _totals([report["cpu"] for report in reports]),
    }


def _merge_engines(found: Sequence[tuple[int, Row]], *, several: bool) -> Row:
    rows = [row for _, row in found]
    best = max(rows, key=lambda row: STATES.index(row["state"]), default=None)
    state = best["state"] if best else "disk"
    merged: Row = {
        "state": state,
        "tier": _tier(state),
        "slot": best["slot"] if best else None,
        "rank": _most(rows, "rank"),
        "bytes": sum(row["bytes"] for row in rows),
        "pinned": any(row["pinned"] for row in rows),
        "requests": sum(row["requests"] for row in rows),
        "hits": sum(row["hits"] for row in rows),
        "loads": sum(row["loads"] for row in rows),
        "last_used": _most(rows, "last_used"),
        "last_error": _first(rows, "last_error"),
    }
    if several:
        merged["engines"] = [
            {"engine": engine, "state": row["state"], "slot": row["slot"]} for engine, row in found
        ]
    return merged


def _tier(state: str) -> str:
    return state if state in ("gpu", "cpu") else "disk"


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
