"""The rules that turn observations of a server into recommendations.

A server that keeps all rules gets no finding. The thresholds are those that operators of LoRA
servers go by; each finding states its rule.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from vllm_multilora.adapters.model.ranks import LARGE_RANK, slot_rank
from vllm_multilora.metrics.label_values import SHARED
from vllm_multilora.slots.budget import GIB, readable
from vllm_multilora.toolbox.advice.findings import Finding, FindingCode
from vllm_multilora.toolbox.advice.observations import ACTIVITY_WINDOW_S, Observations, SeenAdapter
from vllm_multilora.wording import counted, listed

HEADROOM_PERCENT = 20
BURST_SLOTS = 2
EVICTIONS_PER_S = 1.0
SLOW_LOAD_MS = 500.0
SLOW_LOAD_SHARE = 0.05
SLOW_STORAGE_BYTES_PER_S = 500e6
MERGE_SHARE = 0.9
MERGE_REQUESTS = 20
FULL_SHARE = 0.8

_NAMES_SHOWN = 10

_SIZE_RULE = (
    f"max_loras = adapters active within 5 minutes + {HEADROOM_PERCENT} %, rounded up, and at "
    f"least as many as ever had requests at the same time + {BURST_SLOTS}"
)


def advise(seen: Observations) -> list[Finding]:
    """What should be changed about a server; nothing where it keeps all rules."""
    rules = (_slots, _evictions, _cpu_tier, _loads, _failures, _merge, _cold, _max_rank, _large)
    return [finding for rule in rules for finding in rule(seen)]


def slots_needed(seen: Observations) -> int:
    """How large `--max-loras` should be."""
    # In whole numbers: 1.2 times 5 is not 6 in floating point.
    steady = -(-max(seen.active, 0) * (100 + HEADROOM_PERCENT) // 100)
    return max(steady, seen.peak_requested + BURST_SLOTS if seen.peak_requested else 0, 1)


def _slots(seen: Observations) -> Iterator[Finding]:
    needed = slots_needed(seen)
    if needed > seen.slots:
        if seen.adapters and len(seen.adapters) <= seen.slots and not seen.gpu_evictions:
            return  # every adapter that there is has its slot
        yield Finding(
            FindingCode.MAX_LORAS_LOW,
            f"raise --max-loras from {seen.slots} to {needed}",
            f"{demand(seen)}; {seen.gpu_evictions / seen.window_s:.2f} adapters a second lost "
            "their slot",
            _SIZE_RULE,
        )
    elif seen.names_are_cut or not _has_full_window(seen):
        return  # more may be active
    elif seen.active and seen.slots >= max(2 * needed, needed + 4):
        yield Finding(
            FindingCode.MAX_LORAS_HIGH,
            f"lower --max-loras from {seen.slots} to {needed}: the memory of the slots goes to the "
            "KV cache (vllm-multilora plan says how much)",
            demand(seen),
            f"{_SIZE_RULE}; twice as many are too many",
        )


def _evictions(seen: Observations) -> Iterator[Finding]:
    rate = seen.gpu_evictions / seen.window_s
    if rate > EVICTIONS_PER_S and slots_needed(seen) <= seen.slots:
        yield Finding(
            FindingCode.EVICTIONS,
            f"raise --max-loras above {seen.slots}, or pin the busiest adapters "
            "(--multilora-pin NAME)",
            f"{rate:.1f} adapters a second lost their slot; {demand(seen)}",
            f"more than {EVICTIONS_PER_S:g} eviction a second means that max_loras is too low",
        )


def _cpu_tier(seen: Observations) -> Iterator[Finding]:
    rate = seen.cpu_evictions / seen.window_s
    host = seen.host
    requested = -(-max(seen.active, seen.slots) * (100 + HEADROOM_PERCENT) // 100)
    is_short = host.share(requested, requested * host.mean) > 1
    if rate <= EVICTIONS_PER_S and not (seen.cpu_evictions and is_short):
        return
    changes = []
    if host.bytes_limit is not None:
        needed = max(requested * host.mean, (1 + HEADROOM_PERCENT / 100) * host.bytes_limit)
        changes.append(
            f"--multilora-cpu-cache-gib from {host.bytes_limit / GIB:.2f} to "
            f"{math.ceil(needed / GIB * 100) / 100:.2f}"
        )
    if host.adapters_limit is not None:
        enough = max(requested, host.adapters_limit + 1)
        changes.append(f"--max-cpu-loras from {host.adapters_limit} to {enough}")
    yield Finding(
        FindingCode.CPU_TIER_SMALL,
        "raise " + " and ".join(changes or ["the limits of host memory for adapters"]),
        f"{rate:.2f} adapters a second were thrown out of host memory and are read from disk "
        f"again; it holds {counted(host.adapters, 'adapter')} with {readable(int(host.bytes))}, "
        f"and {_active(seen)} had requests",
        "host memory holds the adapters active within 5 minutes (or all slots') + "
        f"{HEADROOM_PERCENT} %; at most {EVICTIONS_PER_S:g} eviction a second",
    )


def _loads(seen: Observations) -> Iterator[Finding]:
    times, mean = seen.load_times, seen.host.mean
    slow, median_ms = times.longer_than(SLOW_LOAD_MS), times.quantile(0.5)
    if not slow or slow <= SLOW_LOAD_SHARE * times.total:
        return
    change = "put the adapters on local NVMe instead of network storage"
    is_known = math.isfinite(median_ms)
    measured = f"{median_ms:.0f} ms" if is_known else "more than the longest bucket"
    if not (mean and is_known):
        change += ", or make them smaller"
    else:
        speed = 1000 * mean / median_ms
        measured += f"; an adapter has {readable(int(mean))} on average, read at some "
        measured += f"{readable(int(speed))}/s"
        if speed < SLOW_STORAGE_BYTES_PER_S:
            change = f"the storage is slow: {change}"
        else:
            change = "the files are big: lower ranks or fewer target modules, or load them once "
            change += "into more host memory (--multilora-cpu-cache-gib)"
    yield Finding(
        FindingCode.SLOW_LOADS,
        change,
        f"{slow:.0f} of {counted(round(times.total), 'load')} from disk took over "
        f"{SLOW_LOAD_MS:.0f} ms, half of them up to {measured}",
        f"at most {SLOW_LOAD_SHARE:.0%} of loads take over {SLOW_LOAD_MS:.0f} ms, which means big "
        "files or slow storage",
    )


def _failures(seen: Observations) -> Iterator[Finding]:
    if seen.failures:
        counts = ", ".join(f"{reason}: {count:.0f}" for reason, count in seen.failures.items())
        yield Finding(
            FindingCode.FAILING_LOADS,
            "see which adapters fail and why: vllm-multilora status",
            f"loads failed ({counts})",
            "no load fails",
        )


def _merge(seen: Observations) -> Iterator[Finding]:
    named = {name: count for name, count in seen.requests.items() if name not in SHARED}
    total = max(sum(seen.requests.values()), seen.finished)
    if not named or total < MERGE_REQUESTS:
        return
    name, count = max(named.items(), key=lambda item: item[1])
    if count < MERGE_SHARE * total:
        return
    yield Finding(
        FindingCode.MERGE,
        f"merge {name!r} into a copy of the base model, and serve that without LoRA",
        f"{count:.0f} of {total:.0f} requests ({count / total:.0%}) were for it",
        f"an adapter with {MERGE_SHARE:.0%} or more of the traffic is cheaper merged",
        merge_snippet(seen.model, name),
    )


def merge_snippet(model: str, name: str) -> str:
    """PEFT's way to merge an adapter into its base model."""
    # Names are customers', and what they are pasted into runs.
    source, target = f"FOLDER OF {name}", f"merged-{name}"
    return f"""\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
merged = AutoPeftModelForCausalLM.from_pretrained({source!r}).merge_and_unload()
merged.save_pretrained({target!r})
AutoTokenizer.from_pretrained({model or "BASE MODEL"!r}).save_pretrained({target!r})
# then: vllm serve {shlex.quote(target)} --served-model-name {shlex.quote(name)}"""


def _cold(seen: Observations) -> Iterator[Finding]:
    if not _has_full_window(seen):
        return
    # Behind a shared label nobody can tell whose requests those were.
    cold = [
        adapter
        for adapter in seen.adapters
        if adapter.tier in ("gpu", "cpu") and adapter.name not in (*seen.requests, *SHARED)
    ]
    pinned = [adapter for adapter in cold if adapter.pinned]
    if not seen.cpu_evictions and seen.host.share(seen.host.adapters, seen.host.bytes) < FULL_SHARE:
        cold = pinned  # those in host memory are in nobody's way; a pin is
    if cold:
        unpin = " (and take the pins back)" if pinned else ""
        yield Finding(
            FindingCode.COLD,
            f"unload {_listed(cold)}{unpin}: POST /v1/unload_lora_adapter",
            f"no request for {'them' if len(cold) > 1 else 'it'} in {seen.window_s:.0f} s, and "
            + ("a slot is pinned for it" if cold == pinned else "host memory is needed by others"),
            "adapters without requests leave pinned slots, and host memory that is "
            f"{FULL_SHARE:.0%} full, to others",
        )


def _max_rank(seen: Observations) -> Iterator[Finding]:
    if seen.max_rank is None or not seen.adapters or seen.names_are_cut or not seen.has_all_ranks:
        return  # adapters that have not been read may need more
    highest = max(adapter.rank for adapter in seen.adapters)
    enough = slot_rank(highest) or seen.max_rank
    if highest and 2 * enough <= seen.max_rank:
        yield Finding(
            FindingCode.MAX_RANK_HIGH,
            f"lower --max-lora-rank from {seen.max_rank} to {enough}: a slot takes "
            f"{enough / seen.max_rank:.0%} of the memory then, and the rest goes to the KV cache",
            f"all adapters have been read; their highest rank is {highest}",
            "max_lora_rank is the smallest possible value that holds every adapter",
        )


def _large(seen: Observations) -> Iterator[Finding]:
    large = [adapter for adapter in seen.adapters if adapter.rank >= LARGE_RANK]
    if large:
        yield Finding(
            FindingCode.LARGE_RANK,
            f"train {_listed(large)} with a lower rank, or merge into a copy of the base model",
            f"ranks up to {max(adapter.rank for adapter in large)} are served",
            f"an adapter of rank {LARGE_RANK} has a twelfth as many weights as an 8B model, and "
            "every step with it reads them all",
        )


def _has_full_window(seen: Observations) -> bool:
    """Whether an adapter without requests may be called idle; with a little slack for scrapes."""
    return seen.window_s >= 0.95 * ACTIVITY_WINDOW_S


def _active(seen: Observations) -> str:
    return f"{'at least ' if seen.names_are_cut else ''}{counted(seen.active, 'adapter')}"


def demand(seen: Observations) -> str:
    """How many adapters were active, and in which time."""
    window = min(seen.window_s, ACTIVITY_WINDOW_S)
    return f"{_active(seen)} active within {window:.0f} s, {seen.peak_requested} at the same time"


def _listed(adapters: list[SeenAdapter]) -> str:
    return listed([adapter.name for adapter in adapters], _NAMES_SHOWN)
