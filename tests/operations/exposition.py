"""The text of `/metrics` as a server with the plugin gives it, from a few numbers."""

from collections.abc import Mapping, Sequence
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
    host_adapters_limit: int | None = None
    adapters: Sequence[tuple[str, str, int, bool]] = ()  # name, tier, rank, pinned
    engine: str = "0"

    def ask(self, name: str, times: int = 1) -> None:
        self.requests[name] = self.requests.get(name, 0) + times
        self.finished += times

    def text(self) -> str:
        lines = [
            *self._gauge("vllm:lora_slots", self.slots),
            *self._gauge("vllm:lora_max_rank", self.max_rank),
            *self._gauge("vllm:lora_adapters_wanted", self.requested),
            *self._gauge("vllm:lora_cache_adapters", self.host_adapters, tier="cpu"),
            *self._gauge("vllm:lora_cache_bytes", self.host_bytes, tier="cpu"),
            "# TYPE vllm:lora_requests_by_adapter gauge",
            *(
                self._sample("vllm:lora_requests_by_adapter", count, lora_name=name)
                for name, count in self.requests.items()
            ),
            "# TYPE vllm:request_success_total counter",
            self._sample("vllm:request_success_total", self.finished, finished_reason="stop"),
            "# TYPE vllm:lora_adapter_evict_total counter",
            *(
                self._sample("vllm:lora_adapter_evict_total", count, tier=tier, lora_name="a")
                for tier, count in self.evictions.items()
            ),
            "# TYPE vllm:lora_adapter_load_total counter",
            *(
                self._sample("vllm:lora_adapter_load_total", 1, source="disk", lora_name=name)
                for name in self.loaded
            ),
            "# TYPE vllm:lora_adapter_load_failures_total counter",
            *(
                self._sample("vllm:lora_adapter_load_failures_total", count, reason=reason)
                for reason, count in self.failures.items()
            ),
            "# TYPE vllm:lora_adapter_load_duration_ms histogram",
            *self._load_times(),
            "# TYPE vllm:lora_adapter_info gauge",
            *(
                self._sample(
                    "vllm:lora_adapter_info",
                    1,
                    lora_name=name,
                    tier=tier,
                    rank=str(rank),
                    pinned=str(pinned).lower(),
                )
                for name, tier, rank, pinned in self.adapters
            ),
            "# TYPE python_info gauge",
            'python_info{version="3.12"} 1.0',
        ]
        if self.host_bytes_limit is not None:
            lines += self._gauge("vllm:lora_cache_bytes_limit", self.host_bytes_limit, tier="cpu")
        if self.host_adapters_limit is not None:
            lines += self._gauge(
                "vllm:lora_cache_adapters_limit", self.host_adapters_limit, tier="cpu"
            )
        return "\n".join(lines) + "\n"

    def _gauge(self, name: str, value: float, **labels: str) -> list[str]:
        return [f"# TYPE {name} gauge", self._sample(name, value, **labels)]

    def _sample(self, name: str, value: float, **labels: str) -> str:
        return f"{name}{{{_text({'model_name': 'base', 'engine': self.engine, **labels})}}} {value}"

    def _load_times(self) -> list[str]:
        name = "vllm:lora_adapter_load_duration_ms"
        bounds = [*map(str, map(float, BOUNDS_MS)), "+Inf"]
        counts = [sum(load <= float(bound) for load in self.loads_ms) for bound in bounds]
        return [
            *(
                self._sample(f"{name}_bucket", count, source="disk", le=bound)
                for bound, count in zip(bounds, counts, strict=True)
            ),
            self._sample(f"{name}_sum", sum(self.loads_ms), source="disk"),
            self._sample(f"{name}_count", len(self.loads_ms), source="disk"),
        ]


def _text(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{value}"' for name, value in labels.items())
