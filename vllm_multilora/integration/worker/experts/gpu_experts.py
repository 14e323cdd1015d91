"""What a layer of experts calls on GPUs where vLLM's would call vLLM's punica wrapper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.lora.layers import FusedMoEWithLoRA

from multilora_kernels import BatchPlan
from multilora_kernels.experts.pair_products import PairProducts
from multilora_kernels.experts.products import Ranks
from multilora_kernels.skipping import tokens_to_skip


class GpuExperts:
    """A layer's adapters by this package's Triton kernels.

    Args:
        module: The layer; vLLM has made its slots.
        plan: That of the steps, with slot runs.
        batch_invariant: Whether a row's results must not depend on the other rows.
    """

    def __init__(self, module: FusedMoEWithLoRA, plan: BatchPlan, batch_invariant: bool) -> None:
        w13 = module.w13_lora_a_stacked, module.w13_lora_b_stacked
        w2 = module.w2_lora_a_stacked, module.w2_lora_b_stacked
        self._w13, self._w2 = (PairProducts(*ab, batch_invariant) for ab in (w13, w2))
        count = module.local_num_experts
        self._here = slice(module.ep_rank * count, (module.ep_rank + 1) * count)
        self._plan, self._slots = plan, plan.buffer[plan.layout.runs.token_slot]

    def fill(self, slot: int, w13_ranks: Sequence[Ranks], w2_rank: Ranks) -> None:
        """Says which ranks of a slot count from now on, of all experts or of each."""
        found = [(self._w13.ranks[i], ranks) for i, ranks in enumerate(w13_ranks)]
        for to, ranks in (*found, (self._w2.ranks[0], w2_rank)):
            own = ranks if isinstance(ranks, int) else list(ranks)[self._here]
            to[slot] = torch.as_tensor(own, dtype=torch.int32)

    def clear(self, slot: int) -> None:
        """A slot's adapter does not act on these experts."""
        self.fill(slot, [0] * len(self._w13.ranks), 0)

    def add_lora_w13(
        self,
        y: Any,
        x: Any,
        a: Any,
        b: Any,
        experts: Any,
        weights: Any,
        places: Any,
        *args: Any,
        add_inputs: bool = True,
        token_lora_mapping: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """See vLLM's; what it returns comes back to `add_lora_w2`."""
        is_own = token_lora_mapping is None
        if not len(x) or (is_own and tokens_to_skip(self._plan.header, y)):
            return None, None, None, None
        slots = self._slots if is_own else token_lora_mapping
        pairs = self._w13.sort(experts, slots, places)
        y = y.view(-1, y.size(-1))
        self._w13.add(y, x, pairs, experts.size(1), add_inputs=add_inputs)
        return pairs, None, None, None

    def add_lora_w2(
        self,
        y: Any,
        x: Any,
        a: Any,
        b: Any,
        weights: Any,
        pairs: Any,
        *args: Any,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """See vLLM's."""
        if pairs is not None:
            y, x = y.view(-1, y.size(-1)), x.view(-1, x.size(-1))
            self._w2.add(y, x, pairs, weights.size(1), weights, add_inputs)
