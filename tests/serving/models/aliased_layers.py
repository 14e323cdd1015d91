"""A Llama whose first layers have two names each, as those of Gemma 3n have.

It computes the same function as vLLM's Llama, from the same checkpoints.
"""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM


class AliasedLayersLlamaForCausalLM(LlamaForCausalLM):
    """Registered by the tests that serve it."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model.self_decoder = torch.nn.ModuleDict(
            {"decoder_layers": torch.nn.ModuleList(list(self.model.layers)[:2])}
        )
