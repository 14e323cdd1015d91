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


def _counter(name: str, help: str, labels: tuple[str, ...]) -> Definition:
    return Definition(name, Kind.COUNTER, help, labels)


def _gauge(name: str, help: str, labels: tuple[str, ...] = ()) -> Definition:
    return Definition(name, Kind.GAUGE, help, labels, keeps=False)


def _histogram(
    name: str, help: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
) -> Definition:
    return Definition(name, Kind.HISTOGRAM, help, labels, buckets)


# fmt: off
_LOAD_MS = (
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0,
    1_000.0, 2_500.0, 5_000.0, 10_000.0, 30_000.0, 60_000.0,
)
_WAIT_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)
_LATENCY_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_PACE_S = (0.01, 0.02, 0.05, 0.1, 0.25, 1.0)
# fmt: on

COMMON_LABELS = ("model_name", "engine")
"""vLLM's own; every series has them, except that what no engine has counted has no `engine`."""

LOADS = _counter(
    "vllm:lora_adapter_load_total",
    "LoRA adapters loaded: from files into host memory, for a request or at registration "
    "(source=disk), or from host memory into a slot (source=cpu).",
    ("source", "lora_name"),
)
EVICTIONS = _counter(
    "vllm:lora_adapter_evict_total",
    "LoRA adapters evicted from their slot (tier=gpu) or from host memory (tier=cpu) to make "
    "room; unloading an adapter does not count.",
    ("tier", "lora_name"),
)
LOAD_DURATION = _histogram(
    "vllm:lora_adapter_load_duration_ms",
    "Milliseconds that loads of LoRA adapters took, by source as in vllm:lora_adapter_load_total. "
    "From disk, this includes the wait for the load's turn; into a slot, it is the copy on the "
    "first worker, which runs in parallel with the steps.",
    _LOAD_MS,
    ("source",),
)
ACTIVE = _gauge("vllm:lora_adapters_active", "LoRA adapters in slots now.")
REQUESTS = Definition(
    "vllm:lora_requests_by_adapter",
    # A counter would have to be called `_total`.
    Kind.GAUGE,
    "Requests that the engine has accepted for a LoRA adapter (n=2 counts as two); it only grows.",
    ("lora_name",),
)
HITS = _counter(
    "vllm:lora_cache_hits_total",
    "How often a LoRA adapter joined the running batch and was already in the tier. Host memory "
    "(tier=cpu) is checked only after a miss in the slots (tier=gpu).",
    ("tier",),
)
MISSES = _counter(
    "vllm:lora_cache_misses_total",
    "How often a LoRA adapter joined the running batch and was not in the tier; for host memory, "
    "how often it had to be read for this use.",
    ("tier",),
)
CACHE_ADAPTERS = _gauge(
    "vllm:lora_cache_adapters",
    "LoRA adapters in this engine's slots (tier=gpu), and in the store's host memory, including "
    "those being read (tier=cpu). Engines that share a store each report all of it: use max, not "
    "sum.",
    ("tier",),
)
CACHE_BYTES = _gauge(
    "vllm:lora_cache_bytes",
    "Bytes that LoRA adapters take in a tier now, at true rank, for all workers of the machine; "
    "tiers as in vllm:lora_cache_adapters.",
    ("tier",),
)
CACHE_BYTES_LIMIT = _gauge(
    "vllm:lora_cache_bytes_limit",
    "Bytes that LoRA adapters may take in the tier; engines that share a store have one limit.",
    ("tier",),
)
CACHE_ADAPTERS_LIMIT = _gauge(
    "vllm:lora_cache_adapters_limit",
    "LoRA adapters that the tier may hold; engines that share a store have one limit.",
    ("tier",),
)
SLOTS = _gauge("vllm:lora_slots", "Slots for LoRA adapters (--max-loras).")
SLOTS_FREE = _gauge("vllm:lora_slots_free", "Slots without a LoRA adapter now.")
MAX_RANK = _gauge("vllm:lora_max_rank", "Highest rank a LoRA adapter may have (--max-lora-rank).")
KERNELS = _gauge(
    "vllm:lora_kernels",
    "1 for each kind of layer and range of rows of a step, with the kernels that serve it: ours, "
    "vllm or torch; and why: checked, or ours are wrong here, slower, unchecked, or switched off "
    "(asked). Only where a GPU's kernels were chosen at start.",
    ("kind", "rows", "kernels", "reason"),
)
LOAD_FAILURES = _counter(
    "vllm:lora_adapter_load_failures_total",
    "Loads of LoRA adapters that failed, including registrations, by reason: gone, invalid, "
    "conflict, unreadable, no_memory, timeout, internal; and adapters that were taken out of "
    "service (quarantined). A failed load is repeated as the answer for two seconds, and counts "
    "each time.",
    ("reason",),
)
REQUEST_WAIT = _histogram(
    "vllm:lora_request_wait_seconds",
    "Seconds from a request's arrival in the engine until its LoRA adapter was in host memory or "
    "had failed to load; 0 if it was already there.",
    _WAIT_S,
)
REQUESTED = _gauge(
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
    "1 for each LoRA adapter that has been read and that the engine knows, with its tier (gpu, "
    "cpu, disk), its rank, and whether it is pinned.",
    ("lora_name", "tier", "rank", "pinned"),
)
ROUTE_REQUESTS = _counter(
    "vllm:lora_route_requests_total",
    "Requests for a route's name, by the LoRA adapter that was chosen and why.",
    ("route", "lora_name", "reason"),
)
_USER = ("lora_name", "route", "tenant")
PROMPT_TOKENS = _counter(
    "vllm:lora_prompt_tokens_total",
    "Prompt tokens of requests for LoRA adapters, as in the answers' usage, counted when a "
    "request ends; by route and tenant, if there are any.",
    _USER,
)
CACHED_PROMPT_TOKENS = _counter(
    "vllm:lora_cached_prompt_tokens_total",
    "The part of vllm:lora_prompt_tokens_total that was found in the prefix cache.",
    _USER,
)
GENERATION_TOKENS = _counter(
    "vllm:lora_generation_tokens_total",
    "Tokens generated by requests for LoRA adapters, counted when a request ends; by route and "
    "tenant, if there are any.",
    _USER,
)
REFUSED = _counter(
    "vllm:lora_refused_requests_total",
    "Requests refused by a server with keys: without a valid key (status=401), without permission "
    "(403), for something that does not exist (404), or over a limit (429). tenant is empty if "
    "the key is not a tenant's.",
    ("tenant", "status"),
)
TENANT_TOKENS = _counter(
    "vllm:lora_tenant_tokens_total",
    "Tokens counted against a tenant's limit of tokens per minute; only of tenants that have one.",
    ("tenant",),
)
TENANT_LIMIT = _gauge(
    "vllm:lora_tenant_tokens_per_minute_limit",
    "A tenant's limit of tokens per minute, for all API servers together, once it has used any.",
    ("tenant",),
)
USAGE_LINES_DROPPED = _counter(
    "vllm:lora_usage_lines_dropped_total",
    "Lines of the usage log that were dropped, as they could not be written as fast as they came.",
    (),
)
FIRST_TOKEN = _histogram(
    "vllm:lora_time_to_first_token_seconds",
    "Seconds from the arrival of a request for a LoRA adapter to its first token.",
    _LATENCY_S,
    ("lora_name",),
)
PER_TOKEN = _histogram(
    "vllm:lora_time_per_output_token_seconds",
    "Average seconds between the tokens of a request for a LoRA adapter, after the first one.",
    _PACE_S,
    ("lora_name",),
)
LATENCIES = (FIRST_TOKEN, PER_TOKEN)
"""Latencies per adapter, if they are asked for. API servers count them, as they count tokens."""

TOKENS = (PROMPT_TOKENS, CACHED_PROMPT_TOKENS, GENERATION_TOKENS)
"""Counted by servers, which do not know the engine, as latencies, routes and refusals: no label."""

ALL = tuple(each for each in tuple(globals().values()) if isinstance(each, Definition))
BY_NAME = {definition.name: definition for definition in ALL}


TIERS = ("disk", "cpu", "gpu")


@dataclass(frozen=True)
class AdapterInfo:
    """What `vllm:lora_adapter_info` says about an adapter, as labels and as one number.

    A file is written anew to take a series out of it, and an adapter's tier changes all the time.
    So files have one number for each adapter, and whoever reads it makes labels of it.
    """

    tier: str
    rank: int
    pinned: bool

    def encode(self) -> float:
        return float(1 + TIERS.index(self.tier) + 4 * self.pinned + 8 * self.rank)

    @classmethod
    def decode(cls, number: float) -> AdapterInfo | None:
        """From the number; None from 0, which stands for an adapter that is not known any more."""
        if number < 1:
            return None
        code = int(number) - 1
        return cls(TIERS[code % 4], code // 8, bool(code % 8 // 4))

    def labels(self) -> dict[str, str]:
        return {
            "tier": self.tier,
            "rank": str(self.rank),
            "pinned": "true" if self.pinned else "false",
        }
