"""A step's adapter mapping as arrays, without a Python object per token."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.lora.layers.utils import LoRAMappingType


class BatchMapping:
    """What vLLM's `LoRAMapping` says, kept per request instead of per token.

    vLLM builds two tuples with an entry per token every step and compares and converts them
    entry by entry. This class holds the request's adapter ids and token counts; the tuples are
    made only if somebody asks for them, as the stock wrapper and classification heads do.

    Attributes:
        ids: int64 [requests], each request's adapter id; 0 for none.
        tokens: [requests], tokens scheduled for each request.
        samples: [requests], rows of each request that reach the logits; of the type of `tokens`.
        type: vLLM's mapping type (language model, tower or connector).
    """

    is_prefill = True

    def __init__(
        self,
        ids: npt.NDArray[np.integer],
        tokens: npt.NDArray[np.integer],
        samples: npt.NDArray[np.integer] | None,
        type: LoRAMappingType,
    ) -> None:
        # Copies: vLLM changes its arrays in place between steps, and this one is kept.
        self.ids, self.tokens = ids.copy(), tokens.copy()
        self.samples = (
            np.ones_like(self.tokens) if samples is None else samples.astype(self.tokens.dtype)
        )
        self.type = type

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, BatchMapping)
            and self.type == other.type
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.tokens, other.tokens)
            and np.array_equal(self.samples, other.samples)
        )

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def index_mapping(self) -> tuple[int, ...]:
        """The adapter id of each token."""
        return tuple(self.ids.repeat(self.tokens).tolist())

    @cached_property
    def prompt_mapping(self) -> tuple[int, ...]:
        """The adapter id of each row that reaches the logits."""
        return tuple(self.ids.repeat(self.samples).tolist())
