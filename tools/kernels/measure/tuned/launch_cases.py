"""Launches of typical layers for GPUs that need not be there, from tensors without memory.

Together the cases have every kind of launch that the backend starts: both halves in one call and
each by itself, long and short batches, all pairs of types, layouts in which wide loads are possible
and others in which they are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from multilora_kernels.configs import (
    ExpandConfig,
    ShrinkConfig,
    default_expand,
    default_shrink,
    load_table,
)
from multilora_kernels.factors import OutputFactors
from multilora_kernels.plan import PlanLayout
from multilora_kernels.triton.activations import aligned_copy
from multilora_kernels.triton.combine import prepare_combine
from multilora_kernels.triton.expand import prepare_expand
from multilora_kernels.triton.launch import Batch, DeviceFacts, Launch
from multilora_kernels.triton.product import expand_launch, shrink_launch
from multilora_kernels.triton.shrink import prepare_shrink
from tools.kernels.measure.batches import LAYERS, Layer
from tools.kernels.measure.tuned.candidates import expand_candidates, shrink_candidates
from tools.kernels.measure.tuned.trials import workloads


@dataclass(frozen=True)
class Card:
    """What a multiprocessor (compute unit) of a card holds.

    Attributes:
        processors: How many there are, for the computed defaults.
        threads: Of all programs that one holds at once.
        shared_bytes: Of all programs that one holds at once.
        program_bytes: Shared memory that one program can have.
        registers: Of 32 bits, for all threads.
        reserved_bytes: Shared memory that each program takes besides its own.
    """

    processors: int
    threads: int
    shared_bytes: int
    program_bytes: int
    registers: int = 65_536
    reserved_bytes: int = 1024

    def resident(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Programs of so many threads, registers a thread and shared memory that one holds."""
        return min(
            self.threads // threads,
            self.registers // (-(-registers // 8) * 8 * threads),
            self.shared_bytes // max(1, shared_bytes + self.reserved_bytes),
        )


CARDS = {
    "80": Card(108, 2048, 164 << 10, 163 << 10),  # A100
    "89": Card(142, 1536, 100 << 10, 99 << 10),  # L40
    "90": Card(132, 2048, 228 << 10, 227 << 10),  # H100
    "100": Card(148, 2048, 228 << 10, 227 << 10),  # B200
    "120": Card(188, 1536, 100 << 10, 99 << 10),  # RTX PRO 6000
    # MI300X: 4 x 512 registers for the 64 lanes of a wave.
    "gfx942": Card(304, 2048, 64 << 10, 64 << 10, registers=131_072, reserved_bytes=0),
}
"""By architecture, as the report's `--arch` names it."""

SHARED_MEMORY_LIMIT = 99 << 10
"""What a program may take on every card since sm_80; the smallest limit is that of sm_86."""


def table_name(architecture: str) -> str:
    """The name of an architecture's configuration table."""
    return architecture if architecture.startswith("gfx") else f"sm_{architecture}"


_MAX_TOKENS = 8192
_UNLIMITED = {"tokens": _MAX_TOKENS, "width": 8192, "slices": 1, "max_rank": 64, "item_size": 2}


@dataclass(frozen=True)
class LaunchCase:
    """A layer under a load. The widths are those of Llama models unless its name says otherwise.

    Attributes:
        name: What the table shows.
        k: Columns of x.
        widths: Columns of y, per slice.
        max_rank: Columns reserved for the rank.
        tokens: Rows of the batch.
        dtype: Of activations and weights.
        weight_dtype: Of weights where it is another one.
        batch_invariant: Whether the blocks must not depend on the batch.
        by_column: Whether B's columns are contiguous rather than its rows.
        uneven: Whether weights are views of larger ones, slice by slice of other strides.
        add_inputs: Whether y is added to.
        halves: If not None, each half is a call of its own, and h between them has this type.
        factors: Whether outputs have factors: None, or whether the base layer has a bias then.
        slots: Of adapters.
        shrink: Names and values of the first half's configuration that are not the default's.
    """

    name: str
    k: int
    widths: tuple[int, ...]
    max_rank: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    weight_dtype: torch.dtype | None = None
    batch_invariant: bool = False
    by_column: bool = False
    uneven: bool = False
    add_inputs: bool = True
    halves: torch.dtype | None = None
    factors: bool | None = None
    slots: int = 64
    shrink: tuple[tuple[str, Any], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name}, R {self.max_rank}, T {self.tokens}"


_QKV, _GATE_UP = (4096, (4096, 1024, 1024)), (8192, (28672, 28672))
_GATE_UP_8B = (4096, (14336, 14336))
CASES = (
    LaunchCase("qkv decode", *_QKV, max_rank=16, tokens=16),
    LaunchCase("qkv decode", *_QKV, max_rank=64, tokens=8),
    LaunchCase("qkv decode", *_QKV, max_rank=64, tokens=64),
    LaunchCase("qkv decode", *_QKV, max_rank=256, tokens=8, by_column=True),
    LaunchCase("qkv decode", *_QKV, max_rank=256, tokens=64, by_column=True),
    LaunchCase("qkv decode", *_QKV, max_rank=320, tokens=64),
    LaunchCase("qkv decode", *_QKV, max_rank=512, tokens=8, by_column=True),
    LaunchCase("gate-up 8B decode", *_GATE_UP_8B, max_rank=16, tokens=8, by_column=True),
    LaunchCase("gate-up 8B decode", *_GATE_UP_8B, max_rank=32, tokens=8, by_column=True),
    LaunchCase("gate-up 8B decode", *_GATE_UP_8B, max_rank=32, tokens=64),
    LaunchCase("o mixed", 4096, (4096,), max_rank=64, tokens=256),
    LaunchCase("gate-up 8B mixed", *_GATE_UP_8B, 128, tokens=256, by_column=True),
    LaunchCase("qkv mixed", *_QKV, max_rank=64, tokens=512),
    LaunchCase("qkv prefill", *_QKV, max_rank=64, tokens=2048),
    LaunchCase("qkv prefill", *_QKV, max_rank=64, tokens=8192),
    LaunchCase("qkv prefill, high rank", *_QKV, max_rank=256, tokens=8192),
    LaunchCase("qkv invariant", *_QKV, max_rank=64, tokens=64, batch_invariant=True),
    LaunchCase("qkv invariant, high rank", *_QKV, 256, tokens=64, batch_invariant=True),
    LaunchCase("qkv decode, B by column", *_QKV, max_rank=64, tokens=64, by_column=True),
    LaunchCase("qkv prefill, B by column", *_QKV, max_rank=64, tokens=8192, by_column=True),
    LaunchCase("gate-up 70B decode", *_GATE_UP, max_rank=64, tokens=64),
    LaunchCase("gate-up 70B prefill", *_GATE_UP, max_rank=64, tokens=8192),
    LaunchCase("down 8B decode", 14336, (4096,), max_rank=32, tokens=64),
    LaunchCase("down 8B invariant", 14336, (4096,), 64, tokens=64, batch_invariant=True),
    LaunchCase("qkv decode fp16", *_QKV, max_rank=64, tokens=64, dtype=torch.float16),
    LaunchCase("qkv prefill fp16", *_QKV, max_rank=64, tokens=8192, dtype=torch.float16),
    LaunchCase("qkv decode fp32", *_QKV, max_rank=64, tokens=64, dtype=torch.float32),
    LaunchCase("qkv prefill fp32", *_QKV, max_rank=64, tokens=8192, dtype=torch.float32),
    LaunchCase("qkv fp32, invariant", *_QKV, 64, 64, dtype=torch.float32, batch_invariant=True),
    LaunchCase("qkv decode, fp32 adapters", *_QKV, 64, tokens=64, weight_dtype=torch.float32),
    LaunchCase("qkv prefill, fp32 adapters", *_QKV, 64, tokens=8192, weight_dtype=torch.float32),
    LaunchCase("qkv decode, overwriting", *_QKV, max_rank=64, tokens=64, add_inputs=False),
    LaunchCase("qkv prefill, overwriting", *_QKV, max_rank=64, tokens=8192, add_inputs=False),
    LaunchCase("qkv decode, early", *_QKV, max_rank=64, tokens=64, shrink=(("early", True),)),
    LaunchCase("qkv decode by rows", *_QKV, max_rank=64, tokens=8, shrink=(("vector_rows", 2),)),
    LaunchCase("qkv decode, halves", *_QKV, max_rank=64, tokens=8, halves=torch.float32),
    LaunchCase("qkv decode, halves", *_QKV, max_rank=64, tokens=64, halves=torch.float32),
    LaunchCase("qkv prefill, halves", *_QKV, max_rank=64, tokens=8192, halves=torch.bfloat16),
    LaunchCase("qkv decode, factors", *_QKV, max_rank=64, tokens=64, factors=True),
    LaunchCase("qkv prefill, factors", *_QKV, max_rank=64, tokens=8192, factors=False),
    LaunchCase("qkv decode, uneven strides", *_QKV, max_rank=64, tokens=64, uneven=True),
    # 11,008 columns are 43 blocks, which no number of parts divides.
    LaunchCase("down 7B decode, K with a tail", 11008, (4096,), max_rank=64, tokens=64),
    LaunchCase("K of whole loads only", 1112, (1112,), max_rank=24, tokens=64),
    LaunchCase("odd sides and rank", 1111, (333, 77), max_rank=13, tokens=64),
)


def table_cases(architecture: str) -> list[LaunchCase]:
    """Cases that the entries of the architecture's table are for, at the entries' limits."""
    table = load_table(table_name(architecture))
    cases = []
    halves: tuple[tuple[str, Any], ...] = (("shrink", table.shrink), ("expand", table.expand))
    for half, entries in halves:
        for number, entry in enumerate(entries):
            most = _UNLIMITED | dict(entry.limits)
            widths = (most["width"] // most["slices"],) * most["slices"]
            cases.append(
                LaunchCase(
                    f"table's {half}[{number}]",
                    most["width"] if half == "shrink" else 4096,
                    widths if half == "expand" else (4096,) * most["slices"],
                    most["max_rank"],
                    min(most["tokens"], _MAX_TOKENS),
                    dtype=torch.float32 if most["item_size"] == 4 else torch.bfloat16,
                )
            )
    return cases


def launches(case: LaunchCase, architecture: str) -> Iterator[Launch]:
    """The launches that the backend would run for a case."""
    facts = card_facts(architecture)
    if case.shrink:
        layer = Layer(case.name, case.k, case.widths)
        first, second = workloads(layer, case.tokens, case.max_rank, case.dtype.itemsize, facts)
        config = replace(default_shrink(first), **dict(case.shrink))
        yield from configured_launches(case, facts, config, default_expand(second))
        return
    batch = _batch(case, facts)
    x, y, lora_a, lora_b = _tensors(case)
    if case.halves is None:
        planes, launch = shrink_launch(x, lora_a, batch, 1.0)
        yield launch
        expand = expand_launch(
            y,
            planes,
            lora_b,
            batch,
            0,
            case.add_inputs,
            after_shrink=True,
            factors=_factors(case),
        )
        if expand.before is not None:
            yield expand.before
        yield expand
        return
    h = _empty(len(lora_a), case.tokens, case.max_rank, dtype=case.halves)
    planes, launch = shrink_launch(x, lora_a, batch, 1.0, h.dtype)
    yield launch
    yield prepare_combine(h, planes, batch)
    yield expand_launch(y, h.unsqueeze(0), lora_b, batch, 0, case.add_inputs, after_shrink=False)


def configured_launches(
    case: LaunchCase, facts: DeviceFacts, shrink: ShrinkConfig, expand: ExpandConfig
) -> Iterator[Launch]:
    """The launches of both halves with these blocks, and of the sum between them if there is one.

    Args:
        case: The layer and load.
        facts: The device.
        shrink: Blocks of the first half.
        expand: Blocks of the second half.
    """
    batch = _batch(case, facts)
    x, y, lora_a, lora_b = _tensors(case)
    planes, first = prepare_shrink(x, lora_a, batch, 1.0, shrink)
    yield first
    second = prepare_expand(y, planes, lora_b, batch, 0, True, expand, after_shrink=True)
    if second.before is not None:
        yield second.before
    yield second


def candidate_launches(architecture: str) -> Iterator[tuple[LaunchCase, Launch]]:
    """A launch of each combination of blocks that the tuner tries for a decode and a prefill."""
    seen: set[tuple[Any, ...]] = set()

    def is_new(config: ShrinkConfig | ExpandConfig) -> bool:
        names = ("block_", "vector_rows", "early")
        blocks = tuple(v for k, v in asdict(config).items() if k.startswith(names))
        known = (type(config), *blocks) in seen
        seen.add((type(config), *blocks))
        return not known

    layer, facts = LAYERS["8b.qkv"], card_facts(architecture)
    memory = CARDS[architecture].program_bytes
    for tokens in (16, _MAX_TOKENS):
        case = LaunchCase(
            "tuner's candidates", layer.inputs, layer.outputs, 64, tokens, by_column=True
        )
        shrink, expand = workloads(layer, tokens, case.max_rank, case.dtype.itemsize, facts)
        for first in filter(is_new, shrink_candidates(shrink, memory)):
            yield case, next(configured_launches(case, facts, first, default_expand(expand)))
        for second in filter(is_new, expand_candidates(expand, memory)):
            *_, last = configured_launches(case, facts, default_shrink(shrink), second)
            yield case, last


def card_facts(architecture: str) -> DeviceFacts:
    """What a launch needs to know of a card of `CARDS`."""
    pdl = architecture.isdigit() and int(architecture) >= 90
    return DeviceFacts(table_name(architecture), CARDS[architecture].processors, pdl)


def _batch(case: LaunchCase, facts: DeviceFacts) -> Batch:
    layout = PlanLayout(_MAX_TOKENS, case.slots)
    ranks = _empty(len(case.widths), case.slots, dtype=torch.int32)
    plan = _empty(layout.size, dtype=torch.int32)
    return Batch(ranks, plan, layout, facts, case.batch_invariant)


def _tensors(
    case: LaunchCase,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """x, y, lora_a and lora_b."""
    dtype, rank = case.weight_dtype or case.dtype, case.max_rank
    lora_a, lora_b = [], []
    for i, n in enumerate(case.widths):
        more = 16 * i if case.uneven else 0
        a = _empty(case.slots, 1, rank + more, case.k + more, dtype=dtype)
        if case.by_column:
            b = _empty(case.slots, 1, rank + more, n + more, dtype=dtype).transpose(-1, -2)
        else:
            b = _empty(case.slots, 1, n + more, rank + more, dtype=dtype)
        lora_a.append(a[..., :rank, : case.k])
        lora_b.append(b[..., :n, :rank])
    x, y = (
        aligned_copy(_empty(case.tokens, width, dtype=case.dtype))  # as odd ones get there
        for width in (case.k, sum(case.widths))
    )
    return x, y, lora_a, lora_b


def _factors(case: LaunchCase) -> OutputFactors | None:
    if case.factors is None:
        return None
    width = sum(case.widths)
    return OutputFactors(
        _empty(case.slots, width, dtype=torch.float32),
        _empty(len(case.widths), case.slots, dtype=torch.int32),
        _empty(width, dtype=torch.float32) if case.factors else None,
    )


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
