"""Refuses options of vLLM's with which adapters would meet the rows of other requests.

An adapter's rows follow from their places among a step's tokens. Some options move rows without
saying so: one customer's request is then computed with another's adapter, in stock vLLM too.
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
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        reason = "the last layers compute the last token of each prompt only"
        yield "--kv-sharing-fast-prefill", "--enable-lora", reason
    parallel = vllm_config.parallel_config
    if parallel.use_ubatching:
        option = "--enable-dbo" if parallel.enable_dbo else "--ubatch-size"
        yield option, "--enable-lora", "the model computes a step's rows in several parts"
