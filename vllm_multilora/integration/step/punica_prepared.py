"""A layer's calls of the punica wrapper, whose weights are described before the first batch.

A layer calls with the same weights in every step, so they are checked once, and on GPUs the
launches are prepared once. What compiled code calls must be prepared before the model is compiled;
elsewhere, the first call does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from multilora_kernels import (
    BatchPlan,
    OutputFactors,
    PreparedExpand,
    PreparedLinear,
    PreparedShrink,
)
from multilora_kernels.launches.by_rows import PreparedByRows
from multilora_kernels.launches.prepared import Prepared
from multilora_kernels.trial.choices import Choice
from vllm_multilora.integration.step.stock_kernels import StockExpand, StockLinear, StockShrink

OURS, VLLM, TORCH = "ours", "vllm", "torch"
"""Names of the kernels that a start may choose between."""

CallKey = tuple[str | int | bool, ...]
"""Which of a layer's calls: its name, and what else tells it apart."""

_Slices = tuple[torch.Tensor, ...]


class PreparedLayers:
    """The part of the punica wrapper that keeps what was prepared for its layer.

    Every method returns what is to be called with a batch, or None while the model is being
    compiled if nobody has called it before.
    """

    backend: str
    plan: BatchPlan
    max_loras: int
    device: Any
    shrink_ranks: torch.Tensor | None
    expand_ranks: torch.Tensor | None
    factors: OutputFactors | None
    # By call, its kernels where a start has chosen; our own elsewhere.
    _choices: Mapping[CallKey, Choice]
    # By what is called, and how: the layer's weights, and the call prepared with them.
    _prepared: dict[CallKey, tuple[object, Prepared]]
    _full_ranks: dict[tuple[int, int], torch.Tensor]

    def take_kernels(self, choices: Mapping[CallKey, Choice]) -> None:
        """Has other kernels compute some of the layer's calls; before the model is compiled.

        Args:
            choices: By call: `("linear", add_inputs)`, `("shrink",)`, `("expand", offset,
                add_inputs)`, `("logits",)`. Their kernels are `OURS`, `VLLM` and `TORCH`.
        """
        self._choices, self._prepared = dict(choices), {}

    @property
    def reads_rests(self) -> bool:
        """Whether kernels of the layer read weights past an adapter's rank: vLLM's do."""
        return any(VLLM in choice.backends for choice in self._choices.values())

    def linear(self, a: _Slices, b: _Slices, *, add_inputs: bool = True) -> Prepared | None:
        """For `add_lora_linear`."""

        def ours(backend: str) -> Prepared:
            return PreparedLinear(
                a,
                b,
                self._ranks(self.shrink_ranks, len(a), a[0].size(-2)),
                self.plan.layout,
                add_inputs=add_inputs,
                factors=self.factors if add_inputs else None,
                backend=backend,
            )

        def stock() -> Prepared:
            return StockLinear(a, b, self.plan.layout, add_inputs=add_inputs)

        key = "linear", add_inputs
        return self._call(key, b, lambda: self._chosen(key, ours, stock))

    def shrink(self, a: _Slices) -> Prepared | None:
        """For `add_shrink`."""

        def ours(backend: str) -> Prepared:
            ranks = self._ranks(self.shrink_ranks, len(a), a[0].size(-2))
            return PreparedShrink(a, ranks, self.plan.layout, backend=backend)

        def stock() -> Prepared:
            return StockShrink(a, self.plan.layout)

        key = ("shrink",)
        return self._call(key, a, lambda: self._chosen(key, ours, stock))

    def expand(
        self, b: _Slices | torch.Tensor, offset: int = 0, *, add_inputs: bool = True
    ) -> Prepared | None:
        """For `add_expand`, and for `add_lora_embedding` with its one tensor."""

        def ours(backend: str) -> Prepared:
            slices = slices_of(b)
            return PreparedExpand(
                slices,
                self._ranks(self.expand_ranks, len(slices), slices[0].size(-1)),
                self.plan.layout,
                offset=offset,
                add_inputs=add_inputs,
                backend=backend,
            )

        def stock() -> Prepared:
            layout = self.plan.layout
            return StockExpand(slices_of(b), layout, offset=offset, add_inputs=add_inputs)

        key = "expand", offset, add_inputs
        return self._call(key, b, lambda: self._chosen(key, ours, stock))

    def logits(self, a: torch.Tensor, b: torch.Tensor, columns: int) -> Prepared | None:
        """For `add_lora_logits` with so many columns of y."""

        def ours(backend: str) -> Prepared:
            return PreparedLinear(
                (a,),
                (b[..., :columns, :],),
                self._ranks(self.shrink_ranks, 1, a.size(-2)),
                self.plan.layout,
                backend=backend,
            )

        def stock() -> Prepared:
            return StockLinear((a,), (b,), self.plan.layout)

        key = "logits", columns
        return self._call(key, b, lambda: self._chosen(("logits",), ours, stock))

    def _chosen(
        self, key: CallKey, ours: Callable[[str], Prepared], stock: Callable[[], Prepared]
    ) -> Prepared:
        """The call by the kernels that were chosen for it."""
        choice = self._choices.get(key)
        if choice is None:
            return ours(self.backend)
        calls = {OURS: lambda: ours(self.backend), TORCH: lambda: ours("torch"), VLLM: stock}
        made = [calls[name]() for _, name in choice.ranges]
        bounds = [most for most, _ in choice.ranges if most is not None]
        return PreparedByRows(self.plan.layout, bounds, made) if bounds else made[0]

    def _call(
        self, key: CallKey, weights: object, prepare: Callable[[], Prepared]
    ) -> Prepared | None:
        known: Any = self._prepared.get(key)
        if torch.compiler.is_compiling():
            # A layer calls its own wrapper, with its own weights.
            return None if known is None else known[1]
        if known is None or known[0] is not weights:
            known = self._prepared[key] = weights, prepare()
        return known[1]

    def _ranks(self, true_ranks: torch.Tensor | None, slices: int, rank: int) -> torch.Tensor:
        """The layer's true ranks, or `rank` throughout for layers that keep the shared wrapper."""
        if true_ranks is not None:
            return true_ranks
        key = (slices, rank)
        if key not in self._full_ranks:
            self._full_ranks[key] = torch.full(
                (slices, self.max_loras), rank, dtype=torch.int32, device=self.device
            )
        return self._full_ranks[key]


def slices_of(b: _Slices | torch.Tensor) -> _Slices:
    """The slices of a layer, or the one that comes without a tuple."""
    return (b,) if isinstance(b, torch.Tensor) else b
