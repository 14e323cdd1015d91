"""Which adapter the rows of an output layer belong to.

Linear layers see every token of a step, output layers only some: as a rule the last token of
each request, but for `prompt_logprobs` all tokens of one prompt at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from multilora_kernels import BatchPlan
from vllm_multilora.integration.attached import in_own_class

logger = logging.getLogger(__name__)


@cache
def _warn_of_unknown_rows() -> None:
    logger.warning(
        "An output layer got more rows than the step's adapter mapping covers; adapters of "
        "lm_head are not applied to the surplus. Please report which vLLM feature is in use."
    )


class OutputRows:
    """The plan over an output layer's rows, shared by all such layers of a model.

    Where its rows are not all tokens of the step, as in prefill, it is built with the plan over
    tokens. Rows that the step's mapping does not have cost a copy of their own when a layer asks
    for them: a prompt's with `prompt_logprobs`, and drafts in vLLM's second model runner.
    """

    are_read = True
    """Whether there are output layers with LoRA, as far as is known."""

    def __init__(self, own_plan: BatchPlan) -> None:
        self._token_plan = self._own_plan = own_plan
        self._token_slots: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._request_slots: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._sampler_slots: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._planned: npt.NDArray[np.int64] | None = None
        self._first_token: int | None = None

    @property
    def buffer(self) -> torch.Tensor:
        return self._own_plan.buffer

    def read_slot_runs(self) -> None:
        self._own_plan.sends_slot_runs = True

    def clear(self) -> None:
        self._own_plan.clear()

    def set_step(
        self,
        token_plan: BatchPlan,
        token_slots: npt.NDArray[np.int64],
        sampler_slots: npt.NDArray[np.int64],
    ) -> None:
        """Takes over a step.

        Args:
            token_plan: The plan over all tokens.
            token_slots: The slot of each token; -1 for no adapter.
            sampler_slots: The slot of each sampled row; the same object as `token_slots` if
                every token is sampled, and then the same plan serves both.
        """
        self._token_plan = token_plan
        self._token_slots = token_slots
        self._request_slots = self._sampler_slots = sampler_slots
        if self.are_read:
            self._plan_of(sampler_slots)

    def set_counts(self, counts: npt.NDArray[np.integer]) -> None:
        """Says how many rows each request samples, where the step's mapping had one each.

        vLLM's second model runner describes a step so, whatever number of drafted tokens is
        verified in it, and describes it anew only when the mapping changes.

        Args:
            counts: [requests], the rows of each request.
        """
        if len(counts) != len(self._request_slots):
            return
        one_each = bool((counts == 1).all())
        self._sampler_slots = (
            self._request_slots if one_each else self._request_slots.repeat(counts)
        )

    @contextmanager
    def from_prompt(self, first_token: int) -> Iterator[None]:
        """Within it, an output layer's rows are consecutive tokens of the step, not sampled ones.

        Args:
            first_token: Which token the first row belongs to.
        """
        self._first_token = first_token
        try:
            yield
        finally:
            self._first_token = None

    def plan(self, x: torch.Tensor) -> BatchPlan:
        """The plan over the rows of an output layer's input x of shape [rows, width].

        Rows beyond those that the step's mapping covers get no adapter in this layer, as in stock
        vLLM: nobody can say whose they are.
        """
        slots = self._sampler_slots
        if (first := self._first_token) is not None:
            slots = self._token_slots[first : first + x.size(0)]
        elif len(slots) < x.size(0) == len(self._token_slots):  # a prompt that is all of the step
            slots = self._token_slots
        if len(slots) < x.size(0):
            _warn_of_unknown_rows()
        return self._plan_of(slots)

    def _plan_of(self, slots: npt.NDArray[np.int64]) -> BatchPlan:
        if slots is self._token_slots:
            return self._token_plan
        if self._planned is not slots:
            self._own_plan.update(slots)
            self._planned = slots
        return self._own_plan


class _KnownRows:
    """A model that says which of a step's rows it computes logits of."""

    lora_manager: Any

    def compute_logits(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        compute = super().compute_logits  # type: ignore[misc]
        # VLLM copies the rows that it samples; those of prompts are slices of all rows.
        if hidden_states.untyped_storage().nbytes() == hidden_states.nbytes:
            logits = compute(hidden_states, *args, **kwargs)
            if self.lora_manager.keeps_row_maxima and logits is not None:
                self.lora_manager.row_maxima = logits.amax(dim=-1, keepdim=True)
            return logits
        first = hidden_states.storage_offset() // hidden_states.stride(0)
        # Said here, because some models normalise the rows before their output layer gets them.
        with self.lora_manager.rows_from_prompt(first):
            return compute(hidden_states, *args, **kwargs)


def with_known_rows(model: torch.nn.Module) -> torch.nn.Module:
    """The model, in a class made from its own that maps the rows of prompts to adapters.

    VLLM sends a prompt's rows (`prompt_logprobs`) through the output layer with the mapping of the
    sampled ones: engines on CPUs die of it, and elsewhere adapters meet the wrong rows.
    """
    makes_vectors = not hasattr(model, "compute_logits")
    return model if makes_vectors else in_own_class(model, _KnownRows)
