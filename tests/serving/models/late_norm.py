"""A Llama that normalises inside `compute_logits`, as MiMo does: what reaches lm_head is computed.

It computes the same function as vLLM's Llama, from the same checkpoints.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM


class LateNormLlamaForCausalLM(LlamaForCausalLM):
    """Registered by the tests that serve it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._normalise = self.model.norm.forward
        self.model.norm.forward = lambda hidden, residual: (hidden + residual, residual)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return super().compute_logits(self._normalise(hidden_states))
