"""Batches and layers for the punica wrapper's tests, and what its operations mean, in float64.

The axes are those of a LoRA kernel's life in vLLM: one token or many for each request, few or many
adapters, free slots, requests without an adapter, ranks and widths that no block divides.
"""

from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

RELATIVE_RMS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Error allowed in a sum, relative to the RMS of the same sum over absolute values."""


@dataclass(frozen=True)
class Case:
    """One batch over one layer.

    Attributes:
        lengths: Tokens of each request.
        adapters: Adapter id of each request, 0 for none.
        slots: Adapter id in each slot, None where it is free.
        k: Columns of the layer's input.
        widths: Columns of each slice's output.
        rank: Ranks of every adapter, and of the stacked weights.
        dtype: Type of weights and activations.
    """

    lengths: tuple[int, ...]
    adapters: tuple[int, ...]
    slots: tuple[int | None, ...]
    k: int = 64
    widths: tuple[int, ...] = (48,)
    rank: int = 8
    dtype: torch.dtype = torch.float32
    seed: int = field(default=0, repr=False)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def request_slots(self) -> list[int]:
        """The slot of each request; -1 for none."""
        return [self.slots.index(a) if a else -1 for a in self.adapters]

    @cached_property
    def token_slots(self) -> list[int]:
        return np.repeat(self.request_slots, self.lengths).tolist()

    def wrapper(self, backend: str) -> "MultiLoRAPunicaWrapper":
        """A wrapper that knows this batch, as vLLM describes it: in tuples."""
        from vllm.lora.layers import LoRAMapping

        from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

        lora_config = SimpleNamespace(max_loras=len(self.slots))
        wrapper = MultiLoRAPunicaWrapper(
            self.tokens + 9, len(self.lengths), DEVICE, backend=backend, lora_config=lora_config
        )
        tokens = tuple(np.repeat(self.adapters, self.lengths).tolist())
        mapping = LoRAMapping(tokens, self.adapters, is_prefill=True)
        wrapper.update_metadata(mapping, list(self.slots), len(self.slots) + 1, 100)
        return wrapper

    def random(self, *shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(*shape, generator=generator).to(DEVICE, self.dtype)

    def lora_a(self) -> tuple[torch.Tensor, ...]:
        """Per slice, [slots, 1, rank, k]."""
        shape = (len(self.slots), 1, self.rank, self.k)
        return tuple(self.random(*shape, seed=i) for i in range(len(self.widths)))

    def lora_b(self) -> tuple[torch.Tensor, ...]:
        """Per slice, [slots, 1, width, rank]."""
        return tuple(
            self.random(len(self.slots), 1, width, self.rank, seed=10 + i)
            for i, width in enumerate(self.widths)
        )


CASES = {
    "decode-7-requests": Case((1,) * 7, (3, 1, 0, 3, 2, 0, 1), (1, 2, 3), rank=16),
    "decode-nobody": Case((1,) * 5, (0,) * 5, (1, None), dtype=torch.bfloat16),
    "free-slots-between": Case((1, 2, 1), (7, 5, 0), (None, 5, None, 7, None)),
    "prefill-lengths": Case((13, 1, 29, 4), (2, 0, 1, 2), (1, 2), widths=(33,)),
    "prefill-and-decode": Case((41, 1, 1, 1), (0, 3, 2, 3), (3, 2), rank=32, dtype=torch.float16),
    "qkv": Case((1, 6, 1, 3), (1, 2, 0, 1), (1, 2), k=96, widths=(96, 32, 32), rank=16),
    "qkv-odd": Case((9,), (1,), (1,), k=33, widths=(17, 5, 7), rank=9, dtype=torch.bfloat16),
    "slots-64": Case(
        (5, 19, 2, 1), (64, 1, 0, 40), (*range(2, 65), 1), k=40, widths=(40, 8), rank=16
    ),
}
"""Kinds of batch. More shapes, ranks and types are in the tests of the kernels themselves."""


def shrunk(x: torch.Tensor, a: torch.Tensor, slots: list[int], scale: float = 1.0) -> torch.Tensor:
    """`scale * x[t] @ a[slot of t].T` in float64, zeros for rows without adapter."""
    h = torch.zeros(len(slots), a.size(-2), dtype=torch.float64, device=x.device)
    for row, slot in enumerate(slots):
        if slot >= 0:
            h[row] = scale * x[row].double() @ a[slot, 0].double().T
    return h


def expanded(
    y: torch.Tensor, h: torch.Tensor, b: tuple[torch.Tensor, ...], slots: list[int], offset: int = 0
) -> torch.Tensor:
    """`y[t, slice i] + h[i, t] @ b[i][slot of t].T` in float64."""
    out = y.double()
    for i, weights in enumerate(b):
        span = slice(offset, offset := offset + weights.size(-2))
        for row, slot in enumerate(slots):
            if slot >= 0:
                out[row, span] += h[i, row].double() @ weights[slot, 0].double().T
    return out


def linear(
    y: torch.Tensor,
    x: torch.Tensor,
    a: tuple[torch.Tensor, ...],
    b: tuple[torch.Tensor, ...],
    slots: list[int],
    scale: float = 1.0,
) -> torch.Tensor:
    """Both halves in float64."""
    h = torch.stack([shrunk(x, weights, slots, scale) for weights in a])
    return expanded(y, h, b, slots)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Compares with a float64 result; `magnitude` is the same sum over absolute values."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).pow(2).mean().sqrt()
    size = magnitude.pow(2).mean().sqrt().clamp_min(1e-12)
    assert error / size <= RELATIVE_RMS[actual.dtype], f"relative RMS error {error / size:.2e}"
