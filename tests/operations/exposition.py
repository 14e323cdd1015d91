"""The text of `/metrics` as a server with the plugin gives it, from a few numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

BOUNDS_MS = (50, 100, 250, 500, 1000, 2500)


@dataclass
class FakeServer:
    """One engine's counters and gauges; change them between two scrapes."""

    slots: int = 4
    max_rank: int = 16
    requested: int = 0
    requests: dict[str, int] = field(default_factory=dict)
    finished: int = 0
    evictions: dict[str, int] = field(default_factory=dict)  # by tier
    loaded: Sequence[str] = ()  # once from files, each
    loads_ms: list[float] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)  # by reason
    host_adapters: int = 0
    host_bytes: int = 0
    host_bytes_limit: int | None = None
    adapters: Sequence[tuple[str, str, int, bool]] = ()  # name, tier, rank, pinned
    engine: str = "0"

    def ask(self, name: str, times: int = 1) -> None:
        self.requests[name] = self.requests.get(name, 0) + times
        self.finished += times

    def text(self) -> str:
        return "\n".join([*self._lines(), 'python_info{version="3.12"} 1.0']) + "\n"

    def _lines(self) -> Iterator[str]:
        for name, value, labels in self._samples():
            labels = {"model_name": "base", "engine": self.engine, **labels}
            text = ",".join(f'{key}="{label}"' for key, label in labels.items())
            yield f"vllm:{name}{{{text}}} {value}"

    def _samples(self) -> Iterator[tuple[str, float, dict[str, object]]]:
        yield "lora_slots", self.slots, {}
        yield "lora_max_rank", self.max_rank, {}
        yield "lora_adapters_wanted", self.requested, {}
        yield "lora_cache_adapters", self.host_adapters, {"tier": "cpu"}
        yield "lora_cache_bytes", self.host_bytes, {"tier": "cpu"}
        if self.host_bytes_limit is not None:
            yield "lora_cache_bytes_limit", self.host_bytes_limit, {"tier": "cpu"}
        for name, count in self.requests.items():
            yield "lora_requests_by_adapter", count, {"lora_name": name}
        yield "request_success_total", self.finished, {"finished_reason": "stop"}
        for tier, count in self.evictions.items():
            yield "lora_adapter_evict_total", count, {"tier": tier, "lora_name": "a"}
        for name in self.loaded:
            yield "lora_adapter_load_total", 1, {"source": "disk", "lora_name": name}
        for reason, count in self.failures.items():
            yield "lora_adapter_load_failures_total", count, {"reason": reason}
        for name, tier, rank, pinned in self.adapters:
            labels = {"lora_name": name, "tier": tier, "rank": rank, "pinned": str(pinned).lower()}
            yield "lora_adapter_info", 1, labels
        loads = "lora_adapter_load_duration_ms"
        for bound in [*map(str, map(float, BOUNDS_MS)), "+Inf"]:
            count = sum(load <= float(bound) for load in self.loads_ms)
            yield f"{loads}_bucket", count, {"source": "disk", "le": bound}
        yield f"{loads}_sum", sum(self.loads_ms), {"source": "disk"}
        yield f"{loads}_count", len(self.loads_ms), {"source": "disk"}
