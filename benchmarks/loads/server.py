"""A server to be measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.serving.server import VllmServer

KV_CACHE_BYTES = 1 << 30
"""Room for every request that a benchmark has running at a time: none waits for blocks."""


def vllm_server(model: Path, *arguments: str, log: Path, **settings: Any) -> VllmServer:
    """A `tests.serving.server.VllmServer` whose KV cache is as large as one that is in use.

    Args:
        model: The folder of the base model's checkpoint.
        *arguments: Of `vllm serve`.
        log: File that takes the server's standard output and error.
        **settings: As `VllmServer` takes them.
    """
    from tests.serving.server import VllmServer

    return VllmServer(model, *arguments, log=log, kv_cache_bytes=KV_CACHE_BYTES, **settings)
