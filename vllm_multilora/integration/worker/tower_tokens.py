"""How many rows the layers of an encoder have, where vLLM counts others."""

from __future__ import annotations

from typing import Any


def count_all_tower_tokens(model: Any) -> None:
    """Has a model count a token of its tower that stands for the whole image.

    The towers of LLaVA's kind may be CLIPs, which have such a token and drop it at their end; vLLM
    counts what is handed on, and takes rows of one request's image for another's.

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
        handed_on, connector_tokens = count(**item)
        return -(-handed_on // patches) * tokens, connector_tokens

    model.get_mm_lora_token_counts = get_mm_lora_token_counts
