"""Batches like a server's: a model's layers, how popular its adapters are, what ranks they have.

    batch = build(BatchSpec(LAYERS["8b.qkv"], tokens=64, popularity="zipf", ranks="mixed"))

A batch holds everything that one LoRA layer of one step needs, laid out as vLLM lays it out, so
that any implementation can compute it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels.plan import BatchPlan, PlanLayout

Popularity = Literal["one", "uniform", "zipf", "distinct"]
POPULARITIES: tuple[str, ...] = get_args(Popularity)

MIXED_RANKS = (8, 16, 32, 64)
"""What `ranks="mixed"` gives to the slots in turn."""

_ZIPF_EXPONENT = 1.0  # the k-th most popular adapter gets a share proportional to 1 / k


@dataclass(frozen=True)
class Layer:
    """A linear layer that adapters are applied to.

    Attributes:
        name: Model size and layer, such as `8b.qkv`.
        inputs: Columns of x.
        outputs: Columns of y, per slice of a fused layer.
    """

    name: str
    inputs: int
    outputs: tuple[int, ...]

    def scaled(self, divisor: int) -> Layer:
        """The layer with every side divided, for runs in Triton's interpreter.

        Args:
            divisor: 1 leaves the layer as it is.

        Raises:
            ValueError: A side is no multiple of the divisor.
        """
        if divisor == 1:
            return self
        for side in (self.inputs, *self.outputs):
            if divisor < 1 or side % divisor:
                raise ValueError(f"{self.name}: a side of {side} is not divisible by {divisor}")
        return Layer(
            f"{self.name}/{divisor}",
            self.inputs // divisor,
            tuple(width // divisor for width in self.outputs),
        )


def _llama(size: str, hidden: int, key_value: int, intermediate: int) -> tuple[Layer, ...]:
    return (
        Layer(f"{size}.qkv", hidden, (hidden, key_value, key_value)),
        Layer(f"{size}.o", hidden, (hidden,)),
        Layer(f"{size}.gate_up", hidden, (intermediate, intermediate)),
        Layer(f"{size}.down", intermediate, (hidden,)),
    )


LAYERS: dict[str, Layer] = {
    layer.name: layer
    for layer in (*_llama("8b", 4096, 1024, 14336), *_llama("70b", 8192, 1024, 28672))
}
"""The adapted layers of Llama 3 8B and 70B, by name."""


@dataclass(frozen=True)
class BatchSpec:
    """What a batch looks like.

    Attributes:
        layer: The layer.
        tokens: Rows of x.
        popularity: How requests choose among the slots in use. `one`: all the same. `uniform`:
            all equally likely. `zipf`: the k-th with probability proportional to 1 / k.
            `distinct`: in turn, so all different while there are enough slots.
        ranks: The rank of every slot, or `mixed`: `MIXED_RANKS` in turn by slot.
        max_loras: Adapter slots.
        max_rank: Rows of A and columns of B that a slot has memory for.
        run_length: Tokens of a request: 1 in decoding, a prompt's length in prefill.
        active: Slots in use, scattered over all of them; None: all. 0: no token has an adapter.

    Raises:
        ValueError: A value is out of its bounds; the message names it.
    """

    layer: Layer
    tokens: int
    popularity: Popularity = "uniform"
    ranks: int | Literal["mixed"] = "mixed"
    max_loras: int = 64
    max_rank: int = 64
    run_length: int = 1
    active: int | None = None

    def __post_init__(self) -> None:
        if self.popularity not in POPULARITIES:
            raise ValueError(
                f"popularity must be one of {', '.join(POPULARITIES)}, got {self.popularity!r}"
            )
        for name, low in (("tokens", 1), ("max_loras", 1), ("max_rank", 1), ("run_length", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        highest = max(MIXED_RANKS) if self.ranks == "mixed" else self.ranks
        if not 0 < highest <= self.max_rank:
            raise ValueError(f"ranks {self.ranks!r} need 0 < rank <= max_rank {self.max_rank}")
        if self.active is not None and not 0 <= self.active <= self.max_loras:
            raise ValueError(f"active must be from 0 to {self.max_loras} slots, got {self.active}")

    def slot_ranks(self) -> npt.NDArray[np.int32]:
        """The rank of each slot, of shape [max_loras]."""
        ranks = MIXED_RANKS if self.ranks == "mixed" else (self.ranks,)
        return np.resize(np.array(ranks, dtype=np.int32), self.max_loras)


@dataclass
class LayerBatch:
    """One layer of one step; what a contender computes.

    T tokens, K input width, N_i output width of slice i, S slots, R maximum rank.

    Attributes:
        spec: What it was built from.
        token_slots: int64 of shape [T] on the host; -1 for a token without adapter.
        plan: The same as a plan on the device.
        x: of shape [T, K].
        y: of shape [T, sum(N_i)]; the adapters' part is added to it, in place.
        lora_a: per slice, of shape [S, 1, R, K]; zero past a slot's rank.
        lora_b: per slice, of shape [S, 1, N_i, R]; zero past a slot's rank.
        ranks: int32 of shape [slices, S], the true ranks.
    """

    spec: BatchSpec
    token_slots: npt.NDArray[np.int64]
    plan: BatchPlan
    x: torch.Tensor
    y: torch.Tensor
    lora_a: tuple[torch.Tensor, ...]
    lora_b: tuple[torch.Tensor, ...]
    ranks: torch.Tensor

    def with_output(self, y: torch.Tensor) -> LayerBatch:
        """The same batch, sharing all but y."""
        return replace(self, y=y)


def build(
    spec: BatchSpec,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LayerBatch:
    """A seeded batch whose products are about as large as x.

    Args:
        spec: What it looks like.
        device: Where the tensors are; the random numbers differ from device type to device type.
        dtype: Of activations and weights.
        seed: Of tokens and values.
    """
    slots = choose_slots(spec, seed)
    layout = PlanLayout(spec.tokens, spec.max_loras)
    plan = BatchPlan(layout, device)
    plan.update(slots)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, deviation: float = 1.0) -> torch.Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(0.0, deviation, generator=generator)

    layer, max_rank = spec.layer, spec.max_rank
    slot_ranks = torch.from_numpy(spec.slot_ranks()).to(device)
    unused = torch.arange(max_rank, device=device) >= slot_ranks[:, None]
    lora_a, lora_b = [], []
    for width in layer.outputs:
        a = normal(spec.max_loras, 1, max_rank, layer.inputs, deviation=layer.inputs**-0.5)
        b = normal(spec.max_loras, 1, width, max_rank, deviation=max_rank**-0.5)
        lora_a.append(a.masked_fill_(unused[:, None, :, None], 0))
        lora_b.append(b.masked_fill_(unused[:, None, None, :], 0))
    return LayerBatch(
        spec=spec,
        token_slots=slots,
        plan=plan,
        x=normal(spec.tokens, layer.inputs),
        y=normal(spec.tokens, sum(layer.outputs)),
        lora_a=tuple(lora_a),
        lora_b=tuple(lora_b),
        ranks=slot_ranks.repeat(len(layer.outputs), 1),
    )


def choose_slots(spec: BatchSpec, seed: int = 0) -> npt.NDArray[np.int64]:
    """The adapter slot of each token, of shape [tokens]; the tokens of a request are neighbours."""
    random = np.random.default_rng(seed)
    in_use = spec.max_loras if spec.active is None else spec.active
    if not in_use:
        return np.full(spec.tokens, -1, dtype=np.int64)
    slots = random.permutation(spec.max_loras)[:in_use].astype(np.int64)
    requests = -(-spec.tokens // spec.run_length)
    if spec.popularity == "one":
        chosen = np.zeros(requests, dtype=np.int64)
    elif spec.popularity == "distinct":
        chosen = np.arange(requests) % in_use
    else:
        exponent = _ZIPF_EXPONENT if spec.popularity == "zipf" else 0.0
        shares = np.arange(1, in_use + 1) ** -exponent
        chosen = random.choice(in_use, requests, p=shares / shares.sum())
    return slots[chosen].repeat(spec.run_length)[: spec.tokens]
