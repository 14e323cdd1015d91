"""Equal loads of one adapter that come at once: the first one's success is that of all.

Clients may send several. An orchestrator that has its own HTTP server, Ray Serve for instance, has
vLLM's table of models load an adapter for each request that comes before the first load has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.attached import Attached

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

LOADER: Attached[Callable[..., Any]] = Attached("loader")
"""Loads for a table of models, where the gateway keeps the names."""


def was_loaded(table: Mapping[str, LoRARequest], request: Any, before: LoRARequest | None) -> bool:
    """Whether what a call is to load was loaded since its name led to `before`."""
    loaded = table.get(request.lora_name)
    return (
        loaded is not None
        and loaded is not before
        and not request.load_inplace
        and loaded.lora_path == request.lora_path
        and loaded.is_3d_lora_weight == request.is_3d_lora_weight
    )


async def load_lora_adapter(
    original: Callable[..., Any], models: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    """Answers a load that has waited for an equal one with that one's success."""
    before, load = models.lora_requests.get(request.lora_name), LOADER.get(models) or original
    answer = await load(models, request, *args, **kwargs)
    if isinstance(answer, str) or not was_loaded(models.lora_requests, request, before):
        return answer
    return f"Success: LoRA adapter '{request.lora_name}' added successfully."
