"""vLLM's experts on CPUs, with adapters of them.

vLLM's kernel for CPUs makes both projections at once, so that nothing can be added between them. So
it computes the rows without adapters of experts, and `ExpertProducts` computes the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.model_executor.kernels.linear.zentorch_utils import is_zentorch_moe_config_supported
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
    CPUUnquantizedExperts,
    X86CPUUnquantizedExperts,
)
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

from multilora_kernels.experts import ExpertProducts
from multilora_kernels.experts.packed import BLOCK
from multilora_kernels.experts.products import Ranks
from multilora_kernels.operators import Numbered, register

_numbered: Numbered[AdaptedExperts] = Numbered()


class AdaptedExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """Experts whose rows with adapters the plugin computes."""

    _products: ExpertProducts | None = None
    _filled: np.ndarray[Any, np.dtype[np.bool_]]

    def __init__(self, moe_config: Any, quant_config: Any) -> None:
        super().__init__(moe_config, quant_config)
        self._number = _numbered.number(self)
        self._wrapper: Any = None

    def take_slots(self, products: ExpertProducts, slots: int, wrapper: Any) -> None:
        """Has rows computed by `products` whose slots hold something, which none does yet.

        Args:
            products: What computes them.
            slots: How many slots there are.
            wrapper: The punica wrapper that knows the slots of a step's rows.
        """
        self._products, self._wrapper = products, wrapper
        self._filled = np.zeros(slots + 1, dtype=np.bool_)  # and of rows without a slot, -1

    def fill(self, slot: int, w13_ranks: Sequence[Ranks], w2_rank: Ranks) -> None:
        """Says which ranks of a slot count from now on."""
        assert self._products is not None
        self._products.set_ranks(slot, w13_ranks, w2_rank)
        self._filled[slot] = True

    def clear(self, slot: int) -> None:
        """A slot's adapter does not act on these experts."""
        self._filled[slot] = False

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """See vLLM's; in compiled code it is one operator."""
        run = _operator if torch.compiler.is_compiling() else _run
        weighted = apply_router_weight_on_input
        run(output, hidden_states, w1, w2, topk_weights, topk_ids, weighted, self._number)

    def compute(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
        weighted: bool,
    ) -> None:
        """Computes a step's rows.

        Args:
            output: [rows, width]; overwritten.
            x: [rows, width].
            w1: Packed weights of gates and what they multiply.
            w2: Those of what follows.
            weights: [rows, k], the router's.
            experts: [rows, k].
            weighted: Whether x has been multiplied by `weights` already.
        """
        config, empty = self.moe_config, output.new_empty(0)
        base = partial(
            super().apply,
            w1=w1,
            w2=w2,
            activation=config.activation,
            global_num_experts=config.num_experts,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=empty,
            workspace2=empty,
            expert_tokens_meta=None,
            apply_router_weight_on_input=weighted,
        )
        slots = self._slots(len(x))
        adapted = self._filled[slots]
        if not adapted.any():
            base(output, x, topk_weights=weights, topk_ids=experts)
            return
        if not adapted.all():
            rest = torch.from_numpy(np.flatnonzero(~adapted))
            of_rest = x.new_empty(len(rest), output.size(1))
            base(of_rest, x[rest], topk_weights=weights[rest], topk_ids=experts[rest])
            output[rest] = of_rest
        rows = np.flatnonzero(adapted).astype(np.int32)
        if weighted:
            weights = torch.ones_like(weights)
        assert self._products is not None
        self._products(output, x, experts, weights, rows, slots[rows])

    def _slots(self, rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The slot of each row; -1 for none, as in steps that vLLM makes up to warm up."""
        known: np.ndarray[Any, np.dtype[np.int64]] = self._wrapper.token_slots[:rows]
        missing = rows - len(known)
        return np.pad(known, (0, missing), constant_values=-1) if missing else known


class AdaptedX86Experts(AdaptedExperts, X86CPUUnquantizedExperts):
    """The same for processors with AMX."""


def adapted(experts: Any, config: FusedMoEConfig) -> type[AdaptedExperts] | None:
    """The class with adapters of one of vLLM's classes; None if the plugin does not know it."""
    if is_zentorch_moe_config_supported(config):  # has weights and kernels of its own
        return None
    for kind in (AdaptedExperts, AdaptedX86Experts):
        if experts in kind.__mro__[1:] and kind.isa == experts.isa and packed_word(kind.isa):
            return kind
    return None


@cache  # every layer asks
def packed_word(isa: str) -> int:
    """Inputs of a word of weights that vLLM packs for these kernels; 0 if they lie otherwise.

    How they lie is vLLM's own affair, so it is asked.
    """
    word, dtype = (2, torch.bfloat16) if isa == "amx" else (1, torch.float32)
    weights = torch.arange(2048, dtype=torch.int16).view(torch.bfloat16).to(dtype).view(1, 32, 64)
    expected = weights.view(1, 32 // BLOCK, BLOCK, 64 // word, word).transpose(2, 3).flatten()
    found = cpu_prepack_moe_weight(weights, isa).flatten()
    return word if torch.equal(found, expected) else 0


def _run(
    output: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    weighted: bool,
    layer: torch.Tensor,
) -> None:
    _numbered.layer(layer).compute(output, x, w1, w2, weights, experts, weighted)


_operator = register("adapted_experts", _run, "output")
