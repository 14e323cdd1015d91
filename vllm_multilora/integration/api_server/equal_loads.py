"""Loads of one adapter that come at once, where vLLM's own table of models loads it.

An orchestrator that has its own HTTP server, Ray Serve for instance, loads an adapter for each
request that comes before the first load has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


async def load_lora_adapter(
    original: Callable[..., Any], models: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Answers a load that has waited for an equal one with that one's success."""
    before = models.lora_requests.get(request.lora_name)
    answer = await original(models, request, *args, **kwargs)
    loaded = models.lora_requests.get(request.lora_name)
    is_new = loaded is not None and loaded is not before
    if isinstance(answer, str) or not is_new or loaded.lora_path != request.lora_path:
        return answer
    return f"Success: LoRA adapter '{request.lora_name}' added successfully."
