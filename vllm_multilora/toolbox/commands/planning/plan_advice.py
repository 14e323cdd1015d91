"""What a plan says about the adapters in a directory."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_multilora.adapters.model.ranks import LARGE_RANK
from vllm_multilora.slots.budget import readable
from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan
from vllm_multilora.toolbox.planning.plan_hints import Advice
from vllm_multilora.wording import counted, listed

_MAX_NAMED = 5


def advice_lines(plan: MemoryPlan) -> Iterator[str]:
    """The lines about the adapters; none where no directory was given."""
    survey, advice = plan.survey, plan.advice
    if survey is not None:
        count, refused = len(survey.adapters), len(survey.refused)
        size = sum(plan.host_bytes.values())
        yield (
            f"adapters: {count} that the base model accepts, {readable(size)} in host memory; "
            f"{refused} that it does not"
        )
        for name, problems in survey.refused:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            yield f"- {name} cannot be served: {problems[0]}{more}"
    if advice is not None:
        yield from (f"- {need}" for need in _needs(advice, plan))
    yield from (f"- {note}" for note in _notes(plan))


def _needs(advice: Advice, plan: MemoryPlan) -> Iterator[str]:
    total = len(plan.survey.adapters) if plan.survey else 0
    for need in advice.needs:
        size = readable(need.bytes)
        yield f"rank {need.rank}: {need.fits} of {total} fit; slots of it take {size}"


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
    if advice.outliers:
        below, top = advice.outliers
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
