"""What an engine core tells of its adapters, for `GET /v1/lora_adapters`.

It is asked with a single call, and only when a client asks. It answers with plain mappings, since
vLLM sends nothing else to an API server.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_multilora.integration.engine.adapters.adapter_machine import AdapterMachine
from vllm_multilora.integration.engine.adapters.engine_adapters import EngineAdapters
from vllm_multilora.integration.failed_requests import without_folder
from vllm_multilora.states import AdapterState

METHOD = "multilora_adapter_status"
"""Name under which an engine core gives its report; `AdapterExecutorMixin` answers it."""

REGISTER = "multilora_register"
"""Name under which it registers an adapter for an API server, and says what it has read."""

Report = dict[str, Any]
Row = dict[str, Any]

TIERS = {AdapterState.SLOT.value: "gpu", AdapterState.HOST.value: "cpu"}
"""Where an adapter of a state is; of all others, on disk."""


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


def _row(adapters: EngineAdapters, number: int, entry: AdapterMachine | None) -> Row:
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
