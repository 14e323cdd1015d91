"""Says what bytes are worth in the KV cache."""

from __future__ import annotations

from vllm_multilora.planning.kv_cache import KvCache


def kv_share(cache: KvCache, size: int) -> str:
    """Bytes in tokens and requests."""
    return (
        f"{cache.tokens(size):,} tokens, or {cache.requests(size):.2f} requests of "
        f"{cache.model_len:,} tokens"
    )
