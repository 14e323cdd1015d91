"""Compiles the Triton kernels that serving will need, before there are requests to delay.

The blocks of a kernel depend on a layer's shape and on the number of rows. vLLM's own warm-up meets
few numbers of rows; each other one would compile for a second or more in the middle of a step, with
all tenants waiting. Here, each layer is called once for every power of two, which also makes it
prepare its launches. The plan is still empty then, so the kernels start and end without reading or
writing anything. The addresses of activations make no difference to a kernel
(`multilora_kernels.triton.activations`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import torch
from vllm.lora.layers import BaseLayerWithLoRA

from multilora_kernels import SlotTable
from multilora_kernels.launches.prepared import Prepared
from multilora_kernels.trial.kinds import LayerKind
from vllm_multilora.integration.step.punica_prepared import CallKey
from vllm_multilora.integration.worker.kernel_choice.layer_calls import layer_calls
from vllm_multilora.integration.worker.model.model_layout import is_ranked
from vllm_multilora.wording import counted

logger = logging.getLogger(__name__)


def prepare(layer: Any, dtype: torch.dtype) -> None:
    """Describes a layer's weights for its calls in compiled code, before that is compiled.

    Output layers are never compiled: they are prepared when they are first called.
    """
    for key, kind in layer_calls(layer, dtype):
        if key[0] != "logits":
            _prepared(layer, key, kind)


def _prepared(layer: Any, key: CallKey, kind: LayerKind) -> Prepared:
    wrapper, a, b = layer.punica_wrapper, layer.lora_a_stacked, layer.lora_b_stacked
    if key[0] == "logits":
        return wrapper.logits(a, b, kind.columns)
    if kind.operation == "linear":
        return wrapper.linear(a, b, add_inputs=kind.add_inputs)
    return wrapper.shrink(a) if kind.operation == "shrink" else wrapper.expand(b, kind.offset)


def warm_up(
    layers: Iterable[BaseLayerWithLoRA],
    dtype: torch.dtype,
    slots: SlotTable,
    *,
    workers: int = 1,
    worker: int = 0,
) -> None:
    """Calls each layer's kernels once for every number of rows that may choose other blocks.

    Of an output layer, too: with `prompt_logprobs` or drafted tokens it has several for a request.
    MoE expert layers, whose kernels are vLLM's, and classification heads, which run once for a
    request, are left out. All kernels are compiled in several processes before the calls.
    """
    begin = time.perf_counter()
    ranked: list[Any] = [layer for layer in layers if is_ranked(layer)]

    def call_all() -> None:
        for layer in ranked:
            most = layer.punica_wrapper.plan.layout.max_tokens
            for rows in (*(1 << i for i in range((most - 1).bit_length())), most):
                _call(layer, rows, dtype)
        slots.warm_up()

    compiled = ""
    if any(layer.punica_wrapper.backend.startswith("triton") for layer in ranked):
        from multilora_kernels.triton.compiling.compile_ahead import call_compiled  # imports Triton

        found = call_compiled(call_all, workers=workers, worker=worker)
        compiled = (
            f": {counted(found.kernels, 'kernel')}, of which {found.processes} processes compiled "
            f"what Triton's cache lacked, and this one {len(found.late)}"
        )
    else:
        call_all()
    logger.info(
        "LoRA kernels for %s of layer are ready after %.1f s%s.",
        counted(len({kind for layer in ranked for _, kind in layer_calls(layer, dtype)}), "kind"),
        time.perf_counter() - begin,
        compiled,
    )


def _call(layer: Any, rows: int, dtype: torch.dtype) -> None:
    device, plan = layer.punica_wrapper.device, layer.punica_wrapper.plan

    def activations(width: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, width] with the memory of one row: nothing will touch it."""
        return torch.empty(width, dtype=dtype, device=device).expand(rows, width)

    for key, kind in layer_calls(layer, dtype):
        _, given, out = kind.dtypes
        if kind.operation == "expand":
            x = torch.empty(kind.slices, rows, kind.b_rank, dtype=given, device=device)
        else:
            x = activations(kind.inputs, given)
        if kind.operation == "shrink":
            y = torch.empty(kind.slices, rows, kind.a_rank, dtype=out, device=device)
        elif kind.offset:  # y is copied back where that is no multiple of 16
            y = torch.empty(rows, kind.columns, dtype=out, device=device)
        else:
            y = activations(kind.columns, out)
        # Over the tokens' plan, of logits too: that of the sampled rows begins with a step.
        _prepared(layer, key, kind)(y, x, plan)
