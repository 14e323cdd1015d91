"""Adapters and requests with images, audio or other input besides text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from http import HTTPStatus
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.patching.activation import is_active, is_active_behind
from vllm_multilora.integration.server.callers import (
    current_caller,
    current_tenant,
    error_response,
)

if TYPE_CHECKING:
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse


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


def encoder_output_key(
    original: Callable[..., str], processor: Any, mm_hash: str, lora_request: Any
) -> str:
    """The key of an image's cached encoding: each version of an adapter has its own."""
    key = original(processor, mm_hash, lora_request)
    if key == mm_hash or not is_active(processor.vllm_config):
        return key
    return f"{lora_request.lora_int_id}:{key}"


def process_tokens(original: Callable[..., Any], renderer: Any, prompt: Any, **kwargs: Any) -> Any:
    return original(renderer, _of_tenant(prompt), **kwargs)


def _of_tenant(prompt: Any) -> Any:
    """A prompt whose images and the like are kept, once they have been read, for its tenant alone.

    vLLM keeps each under a name that it makes of its content, or of the `uuid` that the client has
    given it, and of what it was read with.
    """
    caller, items = current_caller.get(), prompt.get("multi_modal_data")
    if caller is None or caller.tenant is None or not items:
        return prompt
    read_with = prompt.get("media_io_kwargs") or {}
    owner = caller.own_id("")
    own = {kind: {**read_with.get(kind, {}), "tenant": owner} for kind in items | read_with}
    return {**prompt, "media_io_kwargs": own}


def init_pooling(original: Callable[..., None], processor: Any, *args: Any, **kwargs: Any) -> None:
    original(processor, *args, **kwargs)

    def render_async(*args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        render = partial(copy_context().run, processor.render, *args, **kwargs)
        return asyncio.get_running_loop().run_in_executor(processor._executor, render)

    processor.render_async = render_async


def refuse_features(request: Any) -> ErrorResponse | None:
    """The answer to a tenant that has processed images and the like itself; None to all others.

    `/inference/v1/generate` hands such tensors to the model unchecked: those of a wrong shape end
    the engine, for everybody.

    Args:
        request: One of vLLM's parsed requests.
    """
    if current_tenant() is None or not hasattr(getattr(request, "features", None), "mm_hashes"):
        return None
    return error_response(
        HTTPStatus.FORBIDDEN,
        "The key does not allow `features`: send images and the like as `content_parts`.",
        "features",
    )
