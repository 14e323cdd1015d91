"""How many rows the layers of an encoder have, and which layers have an encoder's rows."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.lora import model_manager
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget

from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

ENCODER = "encoder"
"""What the wrapper of an encoder is called where a decoder follows."""


def encoder_wrapper(
    vllm_config: VllmConfig, lora_config: Any, device: torch.device
) -> MultiLoRAPunicaWrapper:
    """The punica wrapper of a model's encoder, where a decoder follows."""
    module: Any = model_manager  # has ours in its place
    wrapper = module.get_punica_wrapper(
        MultiModalBudget(vllm_config, MULTIMODAL_REGISTRY).get_encoder_budget(),
        max_batches=vllm_config.scheduler_config.max_num_seqs,
        device=device,
        lora_config=lora_config,
    )
    assert isinstance(wrapper, MultiLoRAPunicaWrapper)
    return wrapper


def reads_encoder(module: str) -> bool:
    """Whether a module's rows are an encoder's: of it, or of the attention to what it has made."""
    return ".encoder." in f".{module}." or module.endswith(".encoder_attn.kv_proj")


def count_all_tower_tokens(model: Any) -> None:
    """Has a model count a token of its tower that stands for the whole image.

    The towers of LLaVA's kind may be CLIPs, which have such a token and drop it at their end; vLLM
    counts what is handed on, and takes rows of one request's image for another's. Of LLaVA-NeXT's,
    and of those that hand it on, it does count them all.

    Args:
        model: A model; without such a tower it stays as it is.
    """
    tower = getattr(getattr(model, "vision_tower", None), "vision_model", None)
    embeddings = getattr(tower, "embeddings", None)
    patches, tokens = (getattr(embeddings, f"num_{of}", 0) for of in ("patches", "positions"))
    if patches >= tokens:
        return
    count = model.get_mm_lora_token_counts

    def get_mm_lora_token_counts(**item: Any) -> tuple[int, int | None]:
        counted, connector_tokens = count(**item)
        if counted % tokens:
            counted = -(-counted // patches) * tokens
        return counted, connector_tokens

    model.get_mm_lora_token_counts = get_mm_lora_token_counts
