"""All LoRA metrics: names, types, labels, help texts. One table for recording and reading."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """A metric's type as Prometheus names it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Definition:
    """One metric.

    Attributes:
        name: As exposed; a counter's ends in `_total`.
        kind: Its type.
        help: One sentence for people.
        labels: Names of its own labels, beside `COMMON_LABELS`.
        buckets: Upper bounds of a histogram's buckets, ascending, without infinity.
        keeps: Whether values of processes that have ended still count. What was counted does, a
            state does not.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    keeps: bool = True


def _counter(name: str, help: str, *labels: str) -> Definition:
    return Definition(name, Kind.COUNTER, help, labels)


def _gauge(name: str, help: str, *labels: str) -> Definition:
    return Definition(name, Kind.GAUGE, help, labels, keeps=False)


def _histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Definition:
    return Definition(name, Kind.HISTOGRAM, help, labels, buckets)


# fmt: off
_LOAD_MS = (
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0,
    1_000.0, 2_500.0, 5_000.0, 10_000.0, 30_000.0, 60_000.0,
)
_WAIT_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)
# fmt: on

COMMON_LABELS = ("model_name", "engine")
"""vLLM's own; every series has them, except that what no engine has counted has no `engine`."""

LOADS = _counter(
    "vllm:lora_adapter_load_total",
    "LoRA adapters loaded: from files into host memory (source=disk), from host memory into a "
    "slot (source=cpu).",
    "source",
    "lora_name",
)
EVICTIONS = _counter(
    "vllm:lora_adapter_evict_total",
    "LoRA adapters that gave up their slot (tier=gpu) or host memory (tier=cpu) to make room.",
    "tier",
    "lora_name",
)
LOAD_DURATION = _histogram(
    "vllm:lora_adapter_load_duration_ms",
    "Milliseconds that loads of LoRA adapters took, by source as in vllm:lora_adapter_load_total.",
    _LOAD_MS,
    "source",
)
ACTIVE = _gauge("vllm:lora_adapters_active", "LoRA adapters in slots now.")
REQUESTS = Definition(
    "vllm:lora_requests_by_adapter",
    # A counter would have to be called `_total`.
    Kind.GAUGE,
    "Requests that the engine has accepted for a LoRA adapter; only grows.",
    ("lora_name",),
)
HITS = _counter(
    "vllm:lora_cache_hits_total",
    "Times that a LoRA adapter joined the running batch and was in the tier already.",
    "tier",
)
MISSES = _counter(
    "vllm:lora_cache_misses_total",
    "Times that a LoRA adapter joined the running batch and was not in the tier.",
    "tier",
)
CACHE_ADAPTERS = _gauge(
    "vllm:lora_cache_adapters",
    "LoRA adapters in a tier now; those in slots (tier=gpu) are in host memory (tier=cpu) too.",
    "tier",
)
CACHE_BYTES = _gauge(
    "vllm:lora_cache_bytes",
    "Bytes of the LoRA adapters in a tier now, at true rank, on the worker that reports.",
    "tier",
)
CACHE_BYTES_LIMIT = _gauge(
    "vllm:lora_cache_bytes_limit",
    "Bytes that the tier's LoRA adapters may take, on the worker that reports.",
    "tier",
)
CACHE_ADAPTERS_LIMIT = _gauge(
    "vllm:lora_cache_adapters_limit", "LoRA adapters that the tier may hold.", "tier"
)
SLOTS = _gauge("vllm:lora_slots", "Slots for LoRA adapters (--max-loras).")
SLOTS_FREE = _gauge("vllm:lora_slots_free", "Slots without a LoRA adapter now.")
MAX_RANK = _gauge("vllm:lora_max_rank", "Highest rank a LoRA adapter may have (--max-lora-rank).")
LOAD_FAILURES = _counter(
    "vllm:lora_adapter_load_failures_total",
    "Loads of LoRA adapters that failed: gone, invalid, unreadable, no_memory, timeout, internal.",
    "reason",
)
REQUEST_WAIT = _histogram(
    "vllm:lora_request_wait_seconds",
    "Seconds from a request's arrival in the engine until its LoRA adapter was in host memory on "
    "every worker, or had failed; 0 where it was there already.",
    _WAIT_S,
)
WANTED = _gauge(
    "vllm:lora_adapters_wanted",
    "Different LoRA adapters with requests running or waiting now.",
)
BATCH_ADAPTERS = _histogram(
    "vllm:lora_batch_adapters",
    "Different LoRA adapters in a step.",
    (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0),
)
INFO = _gauge(
    "vllm:lora_adapter_info",
    "1 for each LoRA adapter that the worker has read and knows: where it is (gpu, cpu, disk), its "
    "rank, whether it is pinned.",
    "lora_name",
    "tier",
    "rank",
    "pinned",
)
ROUTE_REQUESTS = _counter(
    "vllm:lora_route_requests_total",
    "Requests for a route's name, by the LoRA adapter that they were given and why.",
    "route",
    "lora_name",
    "reason",
)

ALL = (
    LOADS,
    EVICTIONS,
    LOAD_DURATION,
    ACTIVE,
    REQUESTS,
    HITS,
    MISSES,
    CACHE_ADAPTERS,
    CACHE_BYTES,
    CACHE_BYTES_LIMIT,
    CACHE_ADAPTERS_LIMIT,
    SLOTS,
    SLOTS_FREE,
    MAX_RANK,
    LOAD_FAILURES,
    REQUEST_WAIT,
    WANTED,
    BATCH_ADAPTERS,
    INFO,
    ROUTE_REQUESTS,
)
BY_NAME = {definition.name: definition for definition in ALL}
