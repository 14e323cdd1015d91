"""Formats bytes for people."""

from __future__ import annotations

from vllm_multilora.planning.kv_cache import KvCache

_GIB, _MIB, _KIB = 2**30, 2**20, 2**10


def readable(size: int) -> str:
    """Bytes in GiB, or in smaller units where GiB would hide them."""
    if size >= _GIB // 10:
        return f"{size / _GIB:.2f} GiB"
    if size >= _MIB // 10:
        return f"{size / _MIB:.1f} MiB"
    return f"{size / _KIB:.1f} KiB"


def kv_share(cache: KvCache, size: int) -> str:
    """Bytes in tokens and requests."""
    return (
        f"{cache.tokens(size):,} tokens, or {cache.requests(size):.2f} requests of "
        f"{cache.model_len:,} tokens"
    )
