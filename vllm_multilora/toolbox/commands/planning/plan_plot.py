"""Plots what slots cost."""

from __future__ import annotations

from pathlib import Path

from vllm_multilora.slots.budget import GIB
from vllm_multilora.toolbox.commands.output import plots
from vllm_multilora.toolbox.planning.memory_plan import MemoryPlan


def draw(plan: MemoryPlan, path: Path) -> None:
    """Draws a worker's memory for slots over their number, a line for each rank.

    The plan's own settings are marked. Where the GPU is known, a dashed line says what vLLM may
    take of it beside the weights: a setting above it does not fit, one below leaves the rest for
    the KV cache.

    Args:
        plan: The settings, and those that they are compared with.
        path: The file; its ending is the format.

    Raises:
        PlotError: matplotlib is missing or cannot write the file.
    """
    counts = plan.slot_counts
    with plots.over_slots(counts, path) as axes:
        for rank in plan.compared_ranks:
            totals = [plan.model.by_rank[rank].total(count) / GIB for count in counts]
            axes.plot(counts, totals, "o-", markersize=4, label=f"rank {rank}")
        axes.plot(
            [plan.max_loras],
            [plan.total / GIB],
            "k*",
            markersize=13,
            label=f"{plan.max_loras} of rank {plan.max_lora_rank}: {plan.total / GIB:.2f} GiB",
        )
        if plan.budget is not None and plan.budget > 0:
            axes.axhline(plan.budget / GIB, color="k", linestyle="--", linewidth=1)
            axes.annotate(
                f" {plan.budget / GIB:.1f} GiB for slots and KV cache",
                (counts[0], plan.budget / GIB),
                verticalalignment="bottom",
            )
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set(
            ylabel="GiB of each worker",
            title=f"{plan.model.architecture}, slots in {plan.model.lora_dtype}",
        )
