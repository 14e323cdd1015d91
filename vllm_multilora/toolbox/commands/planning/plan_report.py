"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_multilora.slots.budget import GIB, enough_gib, readable
from vllm_multilora.toolbox.commands.output.text_table import aligned
from vllm_multilora.toolbox.commands.planning.plan_advice import advice_lines
from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan
from vllm_multilora.wording import counted


def report(plan: MemoryPlan) -> list[str]:
    """The lines to print."""
    sections = [
        _head(plan),
        _layers(plan),
        _cost(plan),
        _grid(plan),
        _gpu(plan),
        _host(plan),
        advice_lines(plan),
    ]
    lines: list[str] = []
    for section in sections:
        printed = list(section)
        lines += ["", *printed] if lines and printed else printed
    return lines


def _head(plan: MemoryPlan) -> Iterator[str]:
    model = plan.model
    workers = "1 worker"
    if model.tensor_parallel_size > 1:
        sharding = "fully sharded" if model.fully_sharded else "sharded as by default"
        workers = f"each of {model.tensor_parallel_size} workers, LoRA {sharding}"
    yield f"{model.architecture} in {model.dtype}, slots in {model.lora_dtype}; {workers}"


def _layers(plan: MemoryPlan) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("LAYERS", "COUNT", "BYTES A SLOT", "SHARE")]
    whole = plan.memory.slot_bytes
    for group in plan.memory.groups():
        share = f"{group.slot_bytes / whole:.1%}"
        rows.append((group.name, str(group.layers), f"{group.slot_bytes:,}", share))
    rows.append(("a slot of rank " + str(plan.max_lora_rank), "", f"{whole:,}", ""))
    yield from aligned(rows, right=range(1, len(rows[0])))


def _cost(plan: MemoryPlan) -> Iterator[str]:
    total = plan.total
    fixed = plan.memory.fixed_bytes
    more = f", {fixed:,} of them whatever the number of slots" if fixed else ""
    yield f"{counted(plan.max_loras, 'slot')}: {total:,} bytes ({readable(total)}){more}"
    cache = plan.model.kv_cache
    if cache is not None:
        yield f"in KV cache: {cache.worth(total)} (a token takes {cache.token_bytes:,.0f} bytes)"


def _grid(plan: MemoryPlan) -> Iterator[str]:
    ranks = plan.compared_ranks
    yield "GiB by --max-loras (down) and --max-lora-rank (across)"
    rows: list[tuple[str, ...]] = [("", *map(str, ranks))]
    for slots in plan.slot_counts:
        totals = (plan.model.by_rank[rank].total(slots) for rank in ranks)
        rows.append((str(slots), *(f"{total / GIB:.2f}" for total in totals)))
    yield from aligned(rows, right=range(1, len(rows[0])))


def _gpu(plan: MemoryPlan) -> Iterator[str]:
    if plan.gpu_bytes is None or plan.budget is None or plan.left is None:
        return
    model, cache = plan.model, plan.model.kv_cache
    yield (
        f"of a GPU's {readable(plan.gpu_bytes)}, vLLM takes {plan.utilization:.0%}; the weights "
        f"take {readable(model.weight_bytes)}, the slots {readable(plan.total)}"
        + (f", copies into them {readable(model.staging_bytes)}" if model.staging_bytes else "")
    )
    if plan.budget <= 0:
        yield (
            "the weights alone are more than there is: raise --tensor-parallel-size, or take a "
            "larger GPU or a quantised model"
        )
        return
    if plan.left <= 0:
        yield "that is more than there is: lower --max-loras or --max-lora-rank"
        return
    yield f"{readable(plan.left)} are left for the KV cache, activations and CUDA graphs" + (
        f": at most {cache.worth(plan.left)}" if cache else ""
    )
    if cache:
        yield f"without LoRA: at most {cache.worth(plan.budget)}"


def _host(plan: MemoryPlan) -> Iterator[str]:
    workers = plan.model.tensor_parallel_size
    for_all = "" if workers == 1 else f", for all {workers} workers together"
    yield (
        f"host memory of the machine: an adapter of rank {plan.max_lora_rank} on all modules takes "
        f"{plan.memory.largest_adapter * workers:,} bytes{for_all}"
    )
    yield (
        f"--multilora-cpu-cache-gib must be at least {enough_gib(plan.host_least)}: a batch may "
        f"need {plan.max_loras} such adapters"
    )
