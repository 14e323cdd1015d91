"""A step's adapter mapping as arrays, without a Python object per token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.lora.layers.utils import LoRAMappingType

from vllm_multilora.integration.activated import ActivatedLoRARequest, start_of

_ARRAYS = ("ids", "tokens", "samples", "base_rows")


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
        base_rows: [requests], how many of a request's first tokens in the step its adapter does
            not act on; None: all adapters act on all tokens.
        encoder_items: As of `MultiLoRAWorkerManager.map_encoder`; None: not mapped with the step.
    """

    is_prefill = True
    encoder_items: tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]] | None = None

    def __init__(
        self,
        ids: npt.NDArray[np.integer],
        tokens: npt.NDArray[np.integer],
        samples: npt.NDArray[np.integer] | None,
        type: LoRAMappingType,
        base_rows: npt.NDArray[np.integer] | None = None,
    ) -> None:
        # Copies: vLLM changes its arrays in place between steps, and this one is kept.
        self.ids, self.tokens = ids.copy(), tokens.copy()
        self.samples = (
            np.ones_like(self.tokens) if samples is None else samples.astype(self.tokens.dtype)
        )
        self.type = type
        self.base_rows = base_rows

    def __eq__(self, other: Any) -> bool:
        return (
            isinstance(other, BatchMapping)
            and self.type == other.type
            and all(np.array_equal(getattr(self, a), getattr(other, a)) for a in _ARRAYS)
        )

    __hash__ = None  # type: ignore[assignment]

    def of_tokens(self, values: npt.NDArray[Any], base: int) -> npt.NDArray[Any]:
        """Spreads values of requests over their tokens in the step.

        Args:
            values: [requests].
            base: The value of tokens that the request's adapter does not act on.

        Returns:
            [tokens].
        """
        if self.base_rows is None:
            return values.repeat(self.tokens)
        both = np.stack([np.full_like(values, base), values], axis=1).ravel()
        counts = np.stack([self.base_rows, self.tokens - self.base_rows], axis=1).ravel()
        return both.repeat(counts)

    @cached_property
    def index_mapping(self) -> tuple[int, ...]:
        """The adapter id of each token."""
        return tuple(self.of_tokens(self.ids, 0).tolist())

    @cached_property
    def prompt_mapping(self) -> tuple[int, ...]:
        """The adapter id of each row that reaches the logits."""
        return tuple(self.ids.repeat(self.samples).tolist())


def rows_before(
    starts: npt.NDArray[np.integer],
    computed: npt.NDArray[np.integer],
    tokens: npt.NDArray[np.integer],
) -> npt.NDArray[np.integer] | None:
    """How many of its first tokens in a step each request's adapter does not act on.

    Args:
        starts: [requests], the first token of each request that its adapter acts on.
        computed: [requests], tokens of each request that earlier steps have computed.
        tokens: [requests], tokens of each request in the step.

    Returns:
        [requests]; None where adapters act on all tokens.
    """
    rows = np.clip(starts - computed, 0, tokens)
    return rows if rows.any() else None


def base_rows_of(
    requests: Mapping[str, Any], input_batch: Any, tokens: npt.NDArray[np.integer]
) -> npt.NDArray[np.integer] | None:
    """`BatchMapping.base_rows` of a step.

    Looks at requests in turn only while some of them have activated adapters, and then only at
    those whose prompts are not computed yet: generated tokens are the adapter's. `tokens` are those
    of each request in the step, [requests].
    """
    adapters = input_batch.lora_id_to_lora_request.values()
    if not any(isinstance(lora, ActivatedLoRARequest) for lora in adapters):
        return None
    count = len(tokens)
    computed = input_batch.num_computed_tokens_cpu[:count]
    starts = np.zeros(count, np.int64)
    for index in np.flatnonzero(computed < input_batch.num_prompt_tokens[:count]).tolist():
        starts[index] = start_of(requests[input_batch.req_ids[index]].lora_request)
    return rows_before(starts, computed, tokens)
