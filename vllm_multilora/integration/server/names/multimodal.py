"""Default adapters for images and audio."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from vllm_multilora.integration.server.settings.gateway_activation import is_active_behind


def active_default_adapter(original: Callable[..., Any], serving: Any, request: Any) -> Any:
    """The adapter that the operator has set for what a base-model request holds, if it is one.

    An adapter is no default for being named `image`, or `text`, as anybody may name theirs.
    """
    client: Any = getattr(serving.models, "engine_client", None)
    if not is_active_behind(client):
        return original(serving, request)
    defaults = client.vllm_config.lora_config.default_mm_loras
    if not defaults:
        return None
    adapters = serving.models.lora_requests
    kinds = serving._get_message_types(request) & defaults.keys() & adapters.keys()
    return adapters[kinds.pop()] if len(kinds) == 1 else None


def default_adapters(serving: Any, request: Any) -> set[str]:
    """The operator's defaults that may answer a base-model request; of a batch, each chat's."""
    chats: Any = getattr(request, "messages", None)
    is_batch = isinstance(chats, list) and all(isinstance(chat, list) for chat in chats)
    parts = [SimpleNamespace(messages=chat) for chat in chats] if is_batch else [request]
    found = map(serving._get_active_default_mm_loras, parts)
    return {lora.lora_name for lora in found if lora is not None}
