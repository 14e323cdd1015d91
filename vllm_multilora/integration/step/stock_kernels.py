"""A layer's products by vLLM's own kernels, on our slots and our plan.

Slots keep the layout that suits our kernels: B's columns are contiguous. vLLM's expand kernel takes
B's strides as arguments, and only the function that describes B to it insists on contiguous rows.
So both kinds of kernels read the same slots: there is no second copy of B, which would take half as
much memory again, and nothing is converted when an adapter comes.

What it costs instead: vLLM's kernels multiply by all ranks that a slot has room for, so the part
past an adapter's rank must be zeros. Slots that they read are cleared there whenever an adapter is
copied in (`SlotRests`), at most the bytes of a slot, beside the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels import BatchPlan, PlanLayout
from multilora_kernels.launches.prepared import Prepared
from multilora_kernels.skipping import tokens_to_skip
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.trial_problems import Weights

if TYPE_CHECKING:
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta


_calls: WeakSet[StockCall] = WeakSet()


def restore_tables() -> None:
    """Writes all layers' tables again, after a sleep that kept no memory."""
    for call in _calls:
        for table, copy in call.tables:
            table.copy_(copy)


def _tables_of(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], offset: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What vLLM's kernels look up of a layer's weights, on the device, and copies on the host.

    These are addresses and strides. vLLM finds them by the weights' addresses, and never makes them
    anew. Captured graphs read them where they are, so that they are written again after a sleep
    that kept no memory.
    """
    from vllm.lora.ops.triton_ops.utils import _LORA_A_PTR_DICT, _get_lora_a_ptr

    values: list[Any] = []
    if a:
        _LORA_A_PTR_DICT.pop(tuple(each.data_ptr() for each in a), None)
        values += _get_lora_a_ptr(list(a), a[0].device)
    if b:
        values += _describe_b(b, offset)
    found = [each for each in values if isinstance(each, torch.Tensor)]
    own = {each.data_ptr() for each in (*a, *b)}
    return [(each, each.to("cpu", copy=True)) for each in found if each.data_ptr() not in own]


def _describe_b(b: Sequence[torch.Tensor], offset: int) -> tuple[Any, ...]:
    """Makes vLLM know B's slots, whichever way they are stored; returns what it knows of them.

    Raises:
        RuntimeError: This vLLM describes weights in another way.
    """
    from vllm.lora.ops.triton_ops.utils import _LORA_B_PTR_DICT, _get_lora_b_ptr

    key = tuple(each.data_ptr() for each in b)
    _LORA_B_PTR_DICT.pop(key, None)  # of weights that lay there before
    strides = [torch.empty(each.shape, device="meta").stride() for each in b]  # of rows
    rows = [each.as_strided(each.shape, own) for each, own in zip(b, strides, strict=True)]
    values = tuple(_get_lora_b_ptr(rows, offset, b[0].device))
    if b[0].is_contiguous():
        return values
    columns = []
    for place, dim in ((3, -2), (4, -1)):  # where it has the strides of rows and of ranks
        known, expected = values[place], [each.stride(dim) for each in rows]
        if isinstance(known, torch.Tensor):
            fits = known.tolist() == expected
            own: Any = known.new_tensor([each.stride(dim) for each in b])
        else:
            fits = {known} == set(expected)
            own = b[0].stride(dim)
        if not fits:
            raise RuntimeError("vLLM describes the weights of LoRA layers in an unknown way")
        columns.append(own)
    values = (*values[:3], *columns, *values[5:])
    if isinstance(values[3], int) and len({each.stride(-1) for each in b}) > 1:
        raise RuntimeError("slices of several widths need a table of strides, found a number")
    _LORA_B_PTR_DICT[key] = values
    return values


class StockCall(Prepared):
    """As `PreparedLinear`; without weights `b` as `PreparedShrink`, without `a` `PreparedExpand`.

    Weights are zeros past an adapter's rank, and layouts of plans have slot runs.

    Args:
        a: Per slice, [slots, 1, ranks, inputs]; empty for a call that expands.
        b: Per slice, [slots, 1, outputs, ranks]; empty for a call that shrinks.
        layout: That of plans.
        offset: First column of y.
        add_inputs: Whether y's values are added to.
    """

    def __init__(
        self,
        a: Sequence[torch.Tensor],
        b: Sequence[torch.Tensor],
        layout: PlanLayout,
        *,
        offset: int = 0,
        add_inputs: bool = True,
    ) -> None:
        super().__init__(layout)
        self.tables = _tables_of(a, b, offset)
        _calls.add(self)
        self._a, self._b, self._add_inputs = list(a), list(b), add_inputs
        self._span = slice(offset, offset + sum(each.size(-2) for each in b))
        every_slot = torch.tensor([layout.max_loras + 1], dtype=torch.int32)
        # Whether a batch needs kernels is decided here; in a graph they are always there.
        self._flags = torch.tensor([False]), every_slot

    def run(
        self,
        out: torch.Tensor,
        given: torch.Tensor,
        plan: torch.Tensor,
        header: npt.NDArray[np.int32],
    ) -> None:
        tokens = (out if not self._a else given).size(0)
        is_idle = not tokens or tokens_to_skip(header, out)
        if not self._b and is_idle:
            out.zero_()
        elif not self._add_inputs:
            out[:, self._span].zero_()
        if is_idle:
            return
        runs = self._layout.runs
        # What vLLM's two operators want to know of a step, in their order.
        metadata = (
            plan[runs.token_slot][:tokens],
            plan[runs.by_slot][:tokens],
            plan[runs.length],
            plan[runs.start],
            plan[runs.slot],
            *self._flags,
        )
        h = given if not self._a else out
        if self._a and self._b:
            shape = len(self._a), tokens, self._b[0].size(-1)
            h = given.new_empty(shape, dtype=torch.float32)
        if self._a:
            torch.ops.vllm.lora_shrink(given, self._a, h, *metadata, 1.0)
        if self._b:
            begin, adds = self._span.start, self._add_inputs
            torch.ops.vllm.lora_expand(
                h, self._b, out, *metadata, offset_start=begin, add_inputs=adds
            )


def prepare(
    kind: LayerKind, weights: Weights, layout: PlanLayout
) -> Callable[[torch.Tensor, torch.Tensor, BatchPlan], None]:
    """The call of a kind of layer, for a trial; see `multilora_kernels.trial.trial_backends`."""
    from vllm.lora.ops.triton_ops.utils import _LORA_A_PTR_DICT, _LORA_B_PTR_DICT

    # They would keep all kinds' weights; a trial's process has no other layers.
    _LORA_A_PTR_DICT.clear()
    _LORA_B_PTR_DICT.clear()
    offset, adds = kind.offset, kind.add_inputs
    return StockCall(weights.a, weights.b, layout, offset=offset, add_inputs=adds)


def step_metadata(plan: BatchPlan) -> LoRAKernelMeta:
    """Metadata of vLLM's class over a plan's slot runs, which come to the device with the plan.

    vLLM's own sorts and counts on the device and waits for it, or makes five copies from memory
    that is not pinned. This one needs no copy of its own. Its kernels look at all slots.
    """
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta  # on GPUs only

    buffer, runs = plan.buffer, plan.layout.runs
    every_slot = torch.tensor([runs.max_loras + 1], dtype=torch.int32)
    return LoRAKernelMeta(
        token_lora_mapping=buffer[runs.token_slot],
        token_indices_sorted_by_lora_ids=buffer[runs.by_slot],
        active_lora_ids=buffer[runs.slot],
        num_tokens_per_lora=buffer[runs.length],
        lora_token_start_loc=buffer[runs.start],
        no_lora_flag_cpu=torch.tensor([False]),
        num_active_loras_cpu=every_slot,
        default_num_active_loras_cpu=every_slot,
        captured_lora_counts=[runs.max_loras + 1],
    )
