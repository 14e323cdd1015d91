"""The parts of vLLM's own step metadata that layers other than linear ones still read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.lora import layers
from vllm.lora.layers import BaseLayerWithLoRA, VocabParallelEmbeddingWithLoRA

from multilora_kernels.batch.staging import StagingRing
from vllm_multilora.integration.step.staged_rows import StagedRows

# vLLM has none before 0.31. Until 0.32 there is one kind, whose rows are requests; 0.33 adds one
# whose rows are tokens.
_NONE = ()  # nothing is an instance of it
ClassificationHead: Any = getattr(
    layers,
    "BaseClassificationHeadWithLoRA",
    getattr(layers, "ClassificationHeadWithLoRA", _NONE),
)
TokenHead: Any = getattr(layers, "TokenClassificationHeadWithLoRA", _NONE)
OUTPUT_LAYERS: Any = (layers.LogitsProcessorWithLoRA, ClassificationHead, TokenHead)


class StockRows:
    """Numbers by row that layers other than linear ones read, and only what a model's do.

    Attributes:
        embedding_offsets: First row of each token's adapter in an embedding's A.
        sampler_slots: Slots by sampled row, which full-weight heads read.
        token_slots: Slots by token, which vLLM 0.33's heads for tokens read.
    """

    def __init__(self, max_tokens: int, slots: int, ring: StagingRing) -> None:
        self.token_slots = StagedRows(max_tokens, ring)
        self.sampler_slots = StagedRows(max_tokens, ring)
        self.embedding_offsets = StagedRows(max_tokens, ring)
        self._has_embeddings = self._has_heads = self._has_token_heads = True
        self._vocab_size = 0
        self._first_rows = np.zeros(slots + 1, dtype=np.int64)

    def adopt_layers(self, layers: Sequence[BaseLayerWithLoRA]) -> None:
        """Learns which layers there are; until then all is prepared."""

        def has(kind: type[BaseLayerWithLoRA]) -> bool:
            return any(isinstance(layer, kind) for layer in layers)

        self._has_embeddings = has(VocabParallelEmbeddingWithLoRA)
        self._has_heads, self._has_token_heads = has(ClassificationHead), has(TokenHead)

    def update(
        self,
        token_slots: npt.NDArray[np.int64],
        sampler_slots: npt.NDArray[np.int64],
        vocab_size: int,
    ) -> None:
        """Takes over a step.

        Args:
            token_slots: int64 [tokens], the slot of each; -1: none.
            sampler_slots: int64 [rows], the same of the rows that are sampled.
            vocab_size: Rows of an adapter in an embedding's A.
        """
        if self._has_embeddings:
            if vocab_size != self._vocab_size:
                # By slot; what -1 finds is the last entry, for rows without adapter.
                self._vocab_size = vocab_size
                self._first_rows = np.arange(len(self._first_rows)) * vocab_size
                self._first_rows[-1] = 0
            self.embedding_offsets.update(self._first_rows[token_slots])
        if self._has_heads:
            self.sampler_slots.update(sampler_slots)
        if self._has_token_heads:
            self.token_slots.update(token_slots)

    def clear(self) -> None:
        """Their memory on the device was lost."""
        for rows in (self.embedding_offsets, self.sampler_slots, self.token_slots):
            rows.clear()
