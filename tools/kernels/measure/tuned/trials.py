"""Whole layers under a chosen configuration of one half, on batches for tuning.

The halves depend on each other: a shrink that cuts K into more parts ends sooner and leaves the
expand more planes to add up, and the expand starts while the shrink still ends. So a half is
always timed within its layer, beside the other half's configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from triton.runtime.errors import OutOfResources

from multilora_kernels.configs import (
    ExpandConfig,
    ShrinkConfig,
    Workload,
    default_expand,
    default_shrink,
)
from multilora_kernels.configs.config_facts import power_of_two_up
from multilora_kernels.triton.expand import prepare_expand
from multilora_kernels.triton.launch import Batch, DeviceFacts, Launch, device_facts
from multilora_kernels.triton.shrink import prepare_shrink
from tools.kernels.measure.agreement import TOLERANCES, Expected
from tools.kernels.measure.batches import MIXED_RANKS, BatchSpec, Layer, LayerBatch
from tools.kernels.measure.contenders import by_column
from tools.kernels.measure.timing import Call
from tools.kernels.measure.tuned.selection import UnusableConfigError

_PROMPTS_FROM = 512  # tokens from which a batch is a prefill of prompts rather than a decode step
_PROMPTS = 8

Ranks = int | Literal["mixed"]


def workloads(
    layer: Layer, tokens: int, max_rank: int, item_size: int, facts: DeviceFacts
) -> tuple[Workload, Workload]:
    """The workloads of a layer's halves, as the backend sees them."""
    shrink, expand = (
        Workload(
            tokens=power_of_two_up(tokens),
            width=width,
            slices=len(layer.outputs),
            max_rank=max_rank,
            item_size=item_size,
            architecture=facts.architecture,
            processors=facts.processors,
        )
        for width in (layer.inputs, sum(layer.outputs))
    )
    return shrink, expand


def training_specs(layer: Layer, bucket: range, max_loras: int, max_rank: int) -> list[BatchSpec]:
    """The batches to choose on: full buckets of popular rank mixes.

    Args:
        layer: The layer.
        bucket: Token counts that the choice is for.
        max_loras: Adapter slots.
        max_rank: Reserved for the rank.
    """
    mixed = _mixed(max_rank)
    make = _maker(layer, max_loras, max_rank)
    last = bucket[-1]
    return [
        make(last, "uniform", max_rank),
        make(last, "uniform", mixed),
        make(last, "distinct", mixed),
        make(last, "distinct", max(1, max_rank // 4)),
    ]


def held_out_specs(layer: Layer, bucket: range, max_loras: int, max_rank: int) -> list[BatchSpec]:
    """The batches to check a choice on: other token counts, popularities and ranks."""
    make = _maker(layer, max_loras, max_rank)
    middle, first = bucket[(len(bucket) - 1) * 3 // 4], bucket[0]
    return [
        make(bucket[-1], "zipf", _mixed(max_rank)),
        make(middle, "one", max_rank),
        make(middle, "zipf", max(1, max_rank // 8)),
        make(first, "one", max(1, max_rank // 2)),
    ]


def _mixed(max_rank: int) -> Ranks:
    return "mixed" if max_rank >= max(MIXED_RANKS) else max(1, max_rank // 2)


def _maker(layer: Layer, max_loras: int, max_rank: int) -> Callable[[int, Any, Ranks], BatchSpec]:
    def make(tokens: int, popularity: Any, ranks: Ranks) -> BatchSpec:
        run_length = 1 if tokens < _PROMPTS_FROM else -(-tokens // _PROMPTS)
        return BatchSpec(
            layer, tokens, popularity, ranks, max_loras, max_rank, run_length=run_length
        )

    return make


def buckets(tokens: list[int]) -> Iterator[range]:
    """Token counts cut at the given ones: (1 ... first), (first + 1 ... second), ..."""
    first = 1
    for last in sorted(set(tokens)):
        yield range(first, last + 1)
        first = last + 1


class LayerOnBatch:
    """A layer on one batch, with any configuration of its halves.

    Args:
        batch: Its y is overwritten.
        facts: The device.
        follows: Whether each call begins with another kernel, as the base layer's product comes
            before in serving. Without one there is nothing that a launch could overlap with.
    """

    def __init__(self, batch: LayerBatch, facts: DeviceFacts, *, follows: bool = False) -> None:
        batch = self._batch = by_column(batch)
        self._follows = follows
        self._shared = Batch(batch.ranks, batch.plan.buffer, batch.plan.layout, facts)
        self._expected = Expected(batch)
        self._usable: set[tuple[ShrinkConfig, ExpandConfig]] = set()
        spec = batch.spec
        self._workloads = workloads(
            spec.layer, spec.tokens, spec.max_rank, batch.x.element_size(), facts
        )

    def call(self, shrink: ShrinkConfig | None, expand: ExpandConfig | None) -> Call:
        """Both launches with these configurations; None: the computed default.

        Raises:
            UnusableConfigError: A program does not fit the card or spills registers, or the
                result is wrong.
        """
        chosen = (
            shrink or default_shrink(self._workloads[0]),
            expand or default_expand(self._workloads[1]),
        )
        call = partial(self._run, *chosen)
        if chosen not in self._usable:
            self._check(chosen, call)
            self._usable.add(chosen)
        return call

    def _run(self, shrink: ShrinkConfig, expand: ExpandConfig) -> None:
        if self._follows:
            self._batch.x.mul_(1)
        for launch in self._launches(shrink, expand):
            launch.run()

    def _launches(self, shrink: ShrinkConfig, expand: ExpandConfig) -> Iterator[Launch]:
        batch = self._batch
        planes, launch = prepare_shrink(batch.x, batch.lora_a, self._shared, 1.0, shrink)
        yield launch
        yield prepare_expand(
            batch.y, planes, batch.lora_b, self._shared, 0, True, expand, after_shrink=True
        )

    def _check(self, chosen: tuple[ShrinkConfig, ExpandConfig], call: Call) -> None:
        try:
            for launch in self._launches(*chosen):
                for each in (launch.before, launch):
                    if each is not None and (spilled := spilled_registers(each)):
                        raise UnusableConfigError(
                            f"{each.kernel.__name__} spills {spilled} registers with {chosen}"
                        )
        except OutOfResources as reason:
            raise UnusableConfigError(f"{reason} ({chosen})") from reason
        error = self._expected.relative_error(call)
        if error > TOLERANCES[self._batch.y.dtype]:
            raise UnusableConfigError(f"relative RMS error {error:.2g} with {chosen}")


def spilled_registers(launch: Launch) -> int:
    """Runs a launch, but none before it, and tells how many registers its program spills.

    0 in the interpreter.
    """
    compiled = launch.kernel[launch.grid](**launch.arguments, **launch.constants, **launch.options)
    return 0 if compiled is None else compiled.n_spills


@dataclass(frozen=True)
class ShrinkTrial:
    """A batch for configurations of the first half, beside the default of the second."""

    layer: LayerOnBatch

    def call(self, config: ShrinkConfig | None) -> Call:
        """See `selection.Trial`."""
        return self.layer.call(config, None)


@dataclass(frozen=True)
class ExpandTrial:
    """A batch for configurations of the second half.

    Attributes:
        layer: The layer on the batch.
        shrink: What was chosen for the first half.
    """

    layer: LayerOnBatch
    shrink: ShrinkConfig | None

    def call(self, config: ExpandConfig | None) -> Call:
        """See `selection.Trial`."""
        return self.layer.call(self.shrink, config)


class ComputedDefaults:
    """These kernels without the table that is in force, to see what the table brings."""

    name = "multilora (computed defaults)"

    def prepare(self, batch: LayerBatch) -> Call:
        """See `tools.kernels.measure.contenders.Contender`."""
        return LayerOnBatch(batch, device_facts(batch.x.device)).call(None, None)


def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that a program can have on a card."""
    properties = torch.cuda.get_device_properties(device)
    # ROCm's properties have no limit of their own for what a kernel opts into.
    limit = getattr(properties, "shared_memory_per_block_optin", None)
    return int(limit or properties.shared_memory_per_block)
