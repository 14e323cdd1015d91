"""What an amount of memory means for the KV cache: tokens and requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KvCache:
    """What requests take of one worker's KV cache.

    Attributes:
        request_bytes: Of a request of `model_len` tokens, in whole blocks, in all layers.
        model_len: The longest request (`max_model_len`).
    """

    request_bytes: int
    model_len: int

    @property
    def token_bytes(self) -> float:
        """Bytes of a token, over the longest request: layers with sliding windows take less."""
        return self.request_bytes / self.model_len

    def tokens(self, size: int) -> int:
        """Whole tokens that fit into so many bytes, as vLLM counts them when it starts."""
        return size * self.model_len // self.request_bytes

    def requests(self, size: int) -> float:
        """Requests of `model_len` tokens that fit into so many bytes."""
        return size / self.request_bytes

    def worth(self, size: int) -> str:
        """So many bytes in tokens and requests, for people."""
        return (
            f"{self.tokens(size):,} tokens, or {self.requests(size):.2f} requests of "
            f"{self.model_len:,} tokens"
        )
