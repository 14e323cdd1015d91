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
from vllm_multilora.integration.step.stock_kernels import StockCall

OURS, VLLM, TORCH = "ours", "vllm", "torch"
"""Names of the kernels that a start may choose between."""

CallKey = tuple[str | int | bool, ...]
"""Which of a layer's calls: its name, and what else tells it apart."""

_Slices = tuple[torch.Tensor, ...]


class PreparedLayers:
    """The part of the punica wrapper that keeps what was prepared for its layer.

    Every method returns what is to be called with a batch.
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

    def linear(self, a: _Slices, b: _Slices, *, add_inputs: bool = True) -> Prepared:
        """For `add_lora_linear`."""
        key = "linear", add_inputs
        return self._call(key, b, self._linear, key, a, b, add_inputs)

    def shrink(self, a: _Slices) -> Prepared:
        """For `add_shrink`."""
        return self._call(("shrink",), a, self._shrink, a)

    def expand(
        self, b: _Slices | torch.Tensor, offset: int = 0, *, add_inputs: bool = True
    ) -> Prepared:
        """For `add_expand`, and for `add_lora_embedding` with its one tensor."""
        key = "expand", offset, add_inputs
        return self._call(key, b, self._expand, key, slices_of(b), offset, add_inputs)

    def logits(self, a: torch.Tensor, b: torch.Tensor, columns: int) -> Prepared:
        """For `add_lora_logits` with so many columns of y."""
        key = "logits", columns
        return self._call(key, b, self._linear, ("logits",), (a,), (b,), True, columns)

    def _linear(
        self, key: CallKey, a: _Slices, b: _Slices, add_inputs: bool, columns: int | None = None
    ) -> Prepared:
        layout, ranks = self.plan.layout, self._ranks(self.shrink_ranks, len(a), a[0].size(-2))
        own = b if columns is None else (b[0][..., :columns, :],)
        options: dict[str, Any] = {"add_inputs": add_inputs}
        factors = self.factors if add_inputs else None
        return self._chosen(
            key,
            lambda used: PreparedLinear(
                a, own, ranks, layout, **options, factors=factors, backend=used
            ),
            lambda: StockCall(a, b, layout, **options),
        )

    def _shrink(self, a: _Slices) -> Prepared:
        layout, ranks = self.plan.layout, self._ranks(self.shrink_ranks, len(a), a[0].size(-2))
        return self._chosen(
            ("shrink",),
            lambda used: PreparedShrink(a, ranks, layout, backend=used),
            lambda: StockCall(a, (), layout),
        )

    def _expand(self, key: CallKey, b: _Slices, offset: int, add_inputs: bool) -> Prepared:
        layout, ranks = self.plan.layout, self._ranks(self.expand_ranks, len(b), b[0].size(-1))
        options: dict[str, Any] = {"offset": offset, "add_inputs": add_inputs}
        return self._chosen(
            key,
            lambda used: PreparedExpand(b, ranks, layout, **options, backend=used),
            lambda: StockCall((), b, layout, **options),
        )

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
        self, key: CallKey, weights: object, prepare: Callable[..., Prepared], *args: Any
    ) -> Prepared:
        if torch.compiler.is_compiling():  # a layer calls its own wrapper, with its own weights
            return self._prepared[key][1]
        known = self._prepared.get(key)
        if known is None or known[0] is not weights:
            known = self._prepared[key] = weights, prepare(*args)
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
