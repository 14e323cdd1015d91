"""Tuning a layer: both halves for a range of token counts, as entries of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch

from multilora_kernels.configs import (
    ExpandConfig,
    ShrinkConfig,
    Workload,
    default_expand,
    default_shrink,
)
from multilora_kernels.configs.config_table import TableEntry
from multilora_kernels.triton.compiling.compile_pool import CompilePool, compile_jobs
from multilora_kernels.triton.compiling.compile_process import target_of
from multilora_kernels.triton.launch import DeviceFacts
from tools.kernels.measure.batches import Layer, build
from tools.kernels.measure.timing import Timer
from tools.kernels.measure.tuned.candidates import expand_candidates, shrink_candidates
from tools.kernels.measure.tuned.launch_cases import LaunchCase, configured_launches
from tools.kernels.measure.tuned.selection import Choice, Effort, Margins, choose
from tools.kernels.measure.tuned.trials import (
    ExpandTrial,
    LayerOnBatch,
    ShrinkTrial,
    held_out_specs,
    training_specs,
    workloads,
)

Config = TypeVar("Config", ShrinkConfig, ExpandConfig)

_HELD_OUT_SEED = 1000  # far from the training batches' seeds, which count from 0


@dataclass(frozen=True)
class Task:
    """A class of workloads: a layer for a range of token counts.

    Attributes:
        layer: The layer.
        bucket: The token counts.
        max_loras: Adapter slots.
        max_rank: Reserved for the rank.
        dtype: Of activations and weights.
    """

    layer: Layer
    bucket: range
    max_loras: int
    max_rank: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.layer.name}, R {self.max_rank}, T {self.bucket[0]} to {self.bucket[-1]}"


@dataclass(frozen=True)
class Tuned:
    """The outcome for both halves, with the entries for the table."""

    shrink: Choice[ShrinkConfig]
    expand: Choice[ExpandConfig]
    shrink_entry: TableEntry[ShrinkConfig]
    expand_entry: TableEntry[ExpandConfig]


@dataclass(frozen=True)
class Outlook:
    """What tuning a task takes.

    Attributes:
        shrink: Candidates of the first half.
        expand: Candidates of the second half.
        timed_calls: At most so many timed calls.
    """

    shrink: tuple[ShrinkConfig, ...]
    expand: tuple[ExpandConfig, ...]
    timed_calls: int


def outlook(task: Task, facts: DeviceFacts, shared_memory: int, effort: Effort) -> Outlook:
    """What tuning would time; needs no device."""
    shrink_workload, expand_workload = _workloads(task, facts)
    shrink = shrink_candidates(shrink_workload, shared_memory)
    expand = expand_candidates(expand_workload, shared_memory)
    shape = task.layer, task.bucket, task.max_loras, task.max_rank
    batches = len(training_specs(*shape)), len(held_out_specs(*shape))
    calls = sum(effort.timed_calls(len(half), *batches) for half in (shrink, expand))
    return Outlook(tuple(shrink), tuple(expand), calls)


def tune(
    task: Task,
    device: torch.device,
    facts: DeviceFacts,
    shared_memory: int,
    timer: Timer,
    effort: Effort,
    margins: Margins,
    pool: CompilePool | None = None,
) -> Tuned:
    """Chooses the first half's configuration, then the second half's beside it.

    Args:
        task: What is tuned.
        device: Where it is timed.
        facts: The device.
        shared_memory: Bytes that a program can have.
        timer: How to measure.
        effort: How often.
        margins: What to ask for.
        pool: Compiles a half's candidates before they are timed; None: each in its turn. Whoever
            times meets the same errors at the same configurations, and leaves them out.

    Raises:
        UnusableConfigError: The computed default does not run as it should on this device.
    """
    plan = outlook(task, facts, shared_memory, effort)
    shape = task.layer, task.bucket, task.max_loras, task.max_rank
    training, held_out = (
        [
            LayerOnBatch(build(spec, device, task.dtype, seed), facts, follows=True)
            for seed, spec in enumerate(specs, first_seed)
        ]
        for specs, first_seed in (
            (training_specs(*shape), 0),
            (held_out_specs(*shape), _HELD_OUT_SEED),
        )
    )
    shrink_workload, expand_workload = _workloads(task, facts)
    defaults = default_shrink(shrink_workload), default_expand(expand_workload)

    def prepare(halves: Sequence[tuple[ShrinkConfig, ExpandConfig]]) -> None:
        if pool is not None:
            case = launch_case(task)
            launches = [
                launch for both in halves for launch in configured_launches(case, facts, *both)
            ]
            pool.compile(compile_jobs(launches, target_of(facts.architecture)))

    prepare([(first, defaults[1]) for first in (defaults[0], *plan.shrink)])
    shrink = choose(
        plan.shrink,
        [ShrinkTrial(layer) for layer in training],
        [ShrinkTrial(layer) for layer in held_out],
        timer,
        effort,
        margins,
    )
    prepare([(shrink.config or defaults[0], second) for second in plan.expand])
    expand = choose(
        plan.expand,
        [ExpandTrial(layer, shrink.config) for layer in training],
        [ExpandTrial(layer, shrink.config) for layer in held_out],
        timer,
        effort,
        margins,
    )
    return Tuned(shrink, expand, entry(shrink_workload, shrink), entry(expand_workload, expand))


def launch_case(task: Task) -> LaunchCase:
    """The task's fullest batches, as far as compiling goes."""
    return LaunchCase(
        task.layer.name,
        task.layer.inputs,
        task.layer.outputs,
        task.max_rank,
        task.bucket[-1],
        dtype=task.dtype,
        by_column=True,
        slots=task.max_loras,
    )


def entry(workload: Workload, choice: Choice[Config]) -> TableEntry[Config]:
    """A choice as a table's entry for workloads up to this one."""
    limits = ("tokens", "width", "max_rank", "slices", "item_size")
    gain = None if choice.config is None else round(choice.gain, 4)
    return TableEntry(
        tuple((name, getattr(workload, name)) for name in limits), choice.config, gain
    )


def describe(config: ShrinkConfig | ExpandConfig | None) -> str:
    """A configuration on one line."""
    if config is None:
        return "default"
    return " ".join(f"{f.name}={getattr(config, f.name)}" for f in fields(config))


def _workloads(task: Task, facts: DeviceFacts) -> tuple[Workload, Workload]:
    item_size = torch.empty(0, dtype=task.dtype).element_size()
    return workloads(task.layer, task.bucket[-1], task.max_rank, item_size, facts)
