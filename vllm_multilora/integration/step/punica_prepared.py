"""A layer's calls of the punica wrapper, whose weights are described before the first batch.

A layer calls with the same weights in every step, so they are checked once, and on GPUs the
launches are prepared once. What compiled code calls must be prepared before the model is compiled;
elsewhere, the first call does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from multilora_kernels import (
    BatchPlan,
    OutputFactors,
    PreparedExpand,
    PreparedLinear,
    PreparedShrink,
)
from multilora_kernels.prepared import Prepared

_Call = TypeVar("_Call", bound=Prepared)
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
    # By what is called, and how: the layer's weights, and the call prepared with them.
    _prepared: dict[tuple[Any, ...], tuple[object, Prepared]]
    _full_ranks: dict[tuple[int, int], torch.Tensor]

    def linear(self, a: _Slices, b: _Slices, *, add_inputs: bool = True) -> PreparedLinear | None:
        """For `add_lora_linear`."""

        def prepare() -> PreparedLinear:
            return PreparedLinear(
                a,
                b,
                self._ranks(self.shrink_ranks, len(a), a[0].size(-2)),
                self.plan.layout,
                add_inputs=add_inputs,
                factors=self.factors if add_inputs else None,
                backend=self.backend,
            )

        return self._call(("linear", add_inputs), b, prepare)

    def shrink(self, a: _Slices) -> PreparedShrink | None:
        """For `add_shrink`."""

        def prepare() -> PreparedShrink:
            ranks = self._ranks(self.shrink_ranks, len(a), a[0].size(-2))
            return PreparedShrink(a, ranks, self.plan.layout, backend=self.backend)

        return self._call(("shrink",), a, prepare)

    def expand(
        self, b: _Slices | torch.Tensor, offset: int = 0, *, add_inputs: bool = True
    ) -> PreparedExpand | None:
        """For `add_expand`, and for `add_lora_embedding` with its one tensor."""

        def prepare() -> PreparedExpand:
            slices = slices_of(b)
            return PreparedExpand(
                slices,
                self._ranks(self.expand_ranks, len(slices), slices[0].size(-1)),
                self.plan.layout,
                offset=offset,
                add_inputs=add_inputs,
                backend=self.backend,
            )

        return self._call(("expand", offset, add_inputs), b, prepare)

    def logits(self, a: torch.Tensor, b: torch.Tensor, columns: int) -> PreparedLinear | None:
        """For `add_lora_logits` with so many columns of y."""

        def prepare() -> PreparedLinear:
            return PreparedLinear(
                (a,),
                (b[..., :columns, :],),
                self._ranks(self.shrink_ranks, 1, a.size(-2)),
                self.plan.layout,
                backend=self.backend,
            )

        return self._call(("logits", columns), b, prepare)

    def _call(
        self, key: tuple[Any, ...], weights: object, prepare: Callable[[], _Call]
    ) -> _Call | None:
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
