"""The benchmark's cases: phases x layers x popularities x ranks, and how large they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tools.kernels.measure.batches import LAYERS, POPULARITIES, BatchSpec, Layer

RANKS: tuple[int | Literal["mixed"], ...] = (8, 16, 64, "mixed")
GROUPS = ("decode, mixed ranks", "decode, one rank", "prefill")
_QUICK_LAYERS, _QUICK_POPULARITIES, _QUICK_RANKS = (
    ("8b.qkv", "8b.down"),
    ("zipf", "distinct"),
    (64,),
)


@dataclass(frozen=True)
class Sizes:
    """How large the cases are on a kind of device.

    Attributes:
        divisor: Of the layers' sides.
        decode_tokens: Requests of a decode step, a token each.
        prefill_tokens: Tokens of a prefill step.
        prompt_tokens: Of one request in it.
        max_loras: Adapter slots.
        max_rank: Reserved for the rank.
        dtype: Of activations and weights.
        repetitions: Of every timing.
    """

    divisor: int
    decode_tokens: int
    prefill_tokens: int
    prompt_tokens: int
    max_loras: int
    max_rank: int
    dtype: torch.dtype
    repetitions: int


GPU_SIZES = Sizes(1, 64, 4096, 512, 64, 64, torch.bfloat16, 100)
CPU_SIZES = Sizes(8, 16, 128, 32, 16, 64, torch.float32, 15)


@dataclass(frozen=True)
class Case:
    """One batch to compute.

    Attributes:
        phase: `decode` or `prefill`.
        layer: The layer at its full size.
        popularity: As for `BatchSpec`.
        ranks: Likewise.
    """

    phase: str
    layer: Layer
    popularity: Any
    ranks: int | Literal["mixed"]

    @property
    def name(self) -> str:
        ranks = "mixed" if self.ranks == "mixed" else f"r{self.ranks}"
        return f"{self.phase} {self.layer.name} {self.popularity} {ranks}"

    @property
    def group(self) -> str:
        if self.phase == "prefill":
            return GROUPS[2]
        return GROUPS[0] if self.ranks == "mixed" else GROUPS[1]

    def spec(self, sizes: Sizes) -> BatchSpec:
        prefill = self.phase == "prefill"
        return BatchSpec(
            layer=self.layer.scaled(sizes.divisor),
            tokens=sizes.prefill_tokens if prefill else sizes.decode_tokens,
            popularity=self.popularity,
            ranks=self.ranks,
            max_loras=sizes.max_loras,
            max_rank=sizes.max_rank,
            run_length=sizes.prompt_tokens if prefill else 1,
        )


CASES = tuple(
    Case(phase, layer, popularity, ranks)
    for phase in ("decode", "prefill")
    for layer in LAYERS.values()
    for popularity in POPULARITIES
    for ranks in RANKS
)


def choose_cases(filters: Sequence[str], *, quick: bool) -> list[Case]:
    """The cases to run.

    Args:
        filters: A case is chosen by any filter whose words its name has, each as the beginning
            of a word; all cases if there is none.
        quick: Only some of each group.
    """

    def requested(case: Case) -> bool:
        if quick and not (
            case.layer.name in _QUICK_LAYERS
            and case.popularity in _QUICK_POPULARITIES
            and case.ranks in ("mixed", *_QUICK_RANKS)
        ):
            return False
        words = case.name.split()
        return not filters or any(
            all(any(word.startswith(part) for word in words) for part in each.split())
            for each in filters
        )

    return [case for case in CASES if requested(case)]
