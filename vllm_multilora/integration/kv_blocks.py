"""Keeps what a tenant's adapter leaves in the KV cache from all other requests.

An adapter that overflows leaves NaN and infinity in the keys and values of its requests. vLLM's
attention multiplies whatever is in a block beyond a request's own tokens by zero, which is NaN
again for the next request that has the block. So blocks are cleared before they are reused,
whatever request had them before and however it ended, with vLLM's own mechanism for models with
state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

COUNT_VARIABLE = "VLLM_COMPUTE_NANS_IN_LOGITS"

empties_blocks = False
"""Set where the plugin acts. A module's variable, since vLLM asks a description of the cache, which
knows nothing else; engines of one process share it."""


def start() -> None:
    """Has blocks emptied and logits looked at in this process and in those that it starts."""
    global empties_blocks
    empties_blocks = True
    os.environ.setdefault(COUNT_VARIABLE, "1")


def needs_kv_cache_zeroing(original: Callable[[Any], bool], kv_cache_config: Any) -> bool:
    return empties_blocks or original(kv_cache_config)
