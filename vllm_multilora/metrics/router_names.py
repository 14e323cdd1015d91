"""Exposes metrics under the names that routers read: llm-d's, and those proposed for vLLM.

Nothing is recorded for them: they are made of other metrics' values when these are shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllm_multilora.metrics import definitions as defined

Labels = tuple[tuple[str, str], ...]
Values = Mapping[tuple[Labels, tuple[str, ...]], float]
"""A metric's values by vLLM's labels, and by the values of its own; histograms with their parts."""

LOADED = defined.Definition(
    "vllm:lora_adapter_loaded",
    defined.Kind.GAUGE,
    "1 for each LoRA adapter that is in a slot (level=gpu), or else in host memory (level=cpu).",
    ("adapter_name", "level", "pinned", "rank"),
)
LOAD_SECONDS = defined.Definition(
    "vllm:lora_adapter_load_seconds",
    defined.Kind.HISTOGRAM,
    "Seconds that LoRA adapters took from disk into host memory (transition=disk_to_cpu), and from "
    "there into a slot (transition=cpu_to_gpu).",
    ("transition",),
    tuple(bound / 1_000 for bound in defined.LOAD_DURATION.buckets),
)
GPU_LOADED = defined.Definition(
    "vllm:num_gpu_loaded_lora_adapters", defined.Kind.GAUGE, "LoRA adapters in slots now."
)
CPU_LOADED = defined.Definition(
    "vllm:num_cpu_loaded_lora_adapters",
    defined.Kind.GAUGE,
    "LoRA adapters in host memory now; engines that share a store each show all of it.",
)
GPU_LIMIT = defined.Definition(
    "vllm:max_gpu_lora_adapters", defined.Kind.GAUGE, "Slots for LoRA adapters (--max-loras)."
)

ALL = (LOADED, LOAD_SECONDS, GPU_LOADED, CPU_LOADED, GPU_LIMIT)

_SAME = {
    GPU_LOADED: (defined.ACTIVE, ()),
    CPU_LOADED: (defined.CACHE_ADAPTERS, ("cpu",)),
    GPU_LIMIT: (defined.SLOTS, ()),
}
_TRANSITIONS = {"disk": "disk_to_cpu", "cpu": "cpu_to_gpu"}


def values_of(found: Mapping[str, Values]) -> Iterator[tuple[defined.Definition, Values]]:
    """The metrics of routers, of the values of all others by their names."""
    yield LOADED, dict(_loaded(found.get(defined.INFO.name, {})))
    yield LOAD_SECONDS, dict(_load_seconds(found.get(defined.LOAD_DURATION.name, {})))
    for definition, (source, labels) in _SAME.items():
        values = found.get(source.name, {})
        yield definition, {(of, ()): value for (of, own), value in values.items() if own == labels}


def _loaded(values: Values) -> Iterator[tuple[tuple[Labels, tuple[str, ...]], float]]:
    for (of, (name,)), value in values.items():
        info = defined.AdapterInfo.decode(value)
        if info is not None and info.tier != "disk":
            labels = info.labels()
            yield (of, (name, info.tier, labels["pinned"], labels["rank"])), 1.0


def _load_seconds(values: Values) -> Iterator[tuple[tuple[Labels, tuple[str, ...]], float]]:
    for (of, (source, part)), value in values.items():
        transition = _TRANSITIONS.get(source)
        if transition is None:
            continue
        if part == "sum":
            yield (of, (transition, part)), value / 1_000
        else:
            yield (of, (transition, repr(float(part) / 1_000))), value
