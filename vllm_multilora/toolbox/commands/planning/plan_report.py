"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_multilora.adapters.model.ranks import LARGE_RANK
from vllm_multilora.slots.budget import GIB, enough_gib, readable
from vllm_multilora.toolbox.commands.output.text_table import aligned
from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan
from vllm_multilora.wording import counted, listed

_MAX_NAMED = 5


def report(plan: MemoryPlan) -> list[str]:
    """The lines to print."""
    lines: list[str] = []
    for section in (_head, _layers, _cost, _grid, _gpu, _host, _adapters):
        printed = list(section(plan))
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
    for name, layers, size in plan.memory.groups():
        rows.append((name, str(layers), f"{size:,}", f"{size / whole:.1%}"))
    rows.append((f"a slot of rank {plan.max_lora_rank}", "", f"{whole:,}", ""))
    yield from aligned(rows, right=range(1, len(rows[0])))


def _cost(plan: MemoryPlan) -> Iterator[str]:
    total, fixed = plan.total, plan.memory.fixed_bytes
    more = f", {fixed:,} of them whatever the number of slots" if fixed else ""
    yield f"{counted(plan.max_loras, 'slot')}: {total:,} bytes ({readable(total)}){more}"
    if cache := plan.model.kv_cache:
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
    elif plan.left <= 0:
        yield "that is more than there is: lower --max-loras or --max-lora-rank"
    else:
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


def _adapters(plan: MemoryPlan) -> Iterator[str]:
    if (survey := plan.survey) is not None:
        size = sum(plan.host_bytes.values())
        yield (
            f"adapters: {len(survey.adapters)} that the base model accepts, {readable(size)} in "
            f"host memory; {len(survey.refused)} that it does not"
        )
        for name, problems in survey.refused:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            yield f"- {name} cannot be served: {problems[0]}{more}"
        for need in plan.advice.needs if plan.advice else ():
            fits = f"{need.fits} of {len(survey.adapters)} fit"
            yield f"- rank {need.rank}: {fits}; slots of it take {readable(need.bytes)}"
    yield from (f"- {note}" for note in _notes(plan))


def _notes(plan: MemoryPlan) -> Iterator[str]:
    if plan.max_lora_rank >= LARGE_RANK:
        share = plan.memory.slot_bytes / plan.model.weight_bytes
        yield (
            f"an adapter of rank {plan.max_lora_rank} on all modules is {share:.0%} of the base "
            "model's size, and adds about that share to a token's work: one that is always in use "
            "is better merged"
        )
    advice, survey = plan.advice, plan.survey
    if advice is None or survey is None:
        return
    highest = advice.max_lora_rank
    if highest > plan.max_lora_rank:
        left_out = [a.name for a in survey.adapters if a.rank > plan.max_lora_rank]
        yield (
            f"--max-lora-rank {plan.max_lora_rank} is too small for "
            f"{listed(left_out, _MAX_NAMED)}: --max-lora-rank {highest} serves all"
        )
    elif highest < plan.max_lora_rank:
        saved = plan.total - plan.model.by_rank[highest].total(plan.max_loras)
        yield f"--max-lora-rank {highest} serves all and saves {_worth(saved, plan)}"
    if len(advice.needs) > 1:
        below, top = advice.needs[-2:]
        if len(below.left_out) * 2 <= len(survey.adapters):
            yield (
                f"{listed(below.left_out, _MAX_NAMED)} alone "
                f"need{'s' * (len(below.left_out) == 1)} rank {top.rank}, which costs "
                f"{_worth(top.bytes - below.bytes, plan)}: train at rank {below.rank}, or serve "
                "elsewhere"
            )
    if advice.unused:
        yield (
            f"no adapter touches {', '.join(advice.unused.suffixes)}: --lora-target-modules "
            f"{' '.join(advice.unused.targets)} saves {_worth(advice.unused.bytes, plan)} at rank "
            f"{highest}"
        )
    empty = plan.max_loras - len(survey.adapters)
    if empty > 0:
        saved = empty * plan.memory.slot_bytes
        yield (
            f"{counted(plan.max_loras, 'slot')} for {counted(len(survey.adapters), 'adapter')}: "
            f"{empty} would stay empty, and take {_worth(saved, plan)}"
        )
    if len(survey.adapters) == 1 and not survey.refused:
        yield "one adapter alone costs least when it is merged into the base model"


def _worth(size: int, plan: MemoryPlan) -> str:
    cache = plan.model.kv_cache
    return readable(size) + (f" ({cache.tokens(size):,} tokens of KV cache)" if cache else "")
