"""Whether vLLM computes its rows in the order in which adapters are told of them.

Which adapter a row belongs to follows from its place among a step's tokens, or among the images of
a group. Some of vLLM's options take rows elsewhere without a word: one customer's are then computed
with another's adapter, in stock vLLM too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_multilora.errors import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def require_rows_in_order(vllm_config: VllmConfig) -> None:
    """Refuses options with which adapters would meet others' rows.

    Raises:
        ConfigError: There is such an option.
    """
    for option, flag, reason in _disorder(vllm_config):
        raise ConfigError(
            f"{option} does not go together with {flag}: {reason}, so that one request would be "
            f"computed with another's adapter. Leave one of the two out"
        )


def _disorder(vllm_config: VllmConfig) -> Iterator[tuple[str, str, str]]:
    """An option, what it does not go together with, and why."""
    lora, model = vllm_config.lora_config, vllm_config.model_config
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reason = "the last layers compute the last token of each prompt only"
        yield "--kv-sharing-fast-prefill", "--enable-lora", reason
    parallel = vllm_config.parallel_config
    if parallel.use_ubatching:
        option = "--enable-dbo" if parallel.enable_dbo else "--ubatch-size"
        yield option, "--enable-lora", "the model computes a step's rows in several parts"
    multimodal = None if model is None else model.multimodal_config
    if lora is None or not lora.enable_tower_connector_lora or multimodal is None:
        return
    towers = "--enable-tower-connector-lora"
    if multimodal.mm_encoder_tp_mode == "data":
        yield "--mm-encoder-tp-mode data", towers, "each rank encodes some of the images only"
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        yield "cudagraph_mm_encoder", towers, "images are encoded in the order of their sizes"
    if multimodal.is_multimodal_pruning_enabled():
        reason = "a tower has more rows of a video than are left of it"
        yield "--video-pruning-rate", towers, reason
