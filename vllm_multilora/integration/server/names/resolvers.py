"""Adapters that vLLM's resolvers find by name, with the engine's reasons if one is refused.

vLLM asks its resolvers (`LoRAResolverRegistry`) for names that nobody serves. If an adapter cannot
be loaded, stock vLLM does not say why, and tries again with every request. `FilesystemResolver`
joins its folder with any name, and opens and parses what is there on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.lora.request import LoRARequest
from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

from vllm_multilora.adapters.files.adapter_folder import CONFIG_NAME
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.model.size_limits import DEFAULT_LIMITS
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.failures import describe_failure
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import adapter_directory, registration
from vllm_multilora.integration.server.names.adapter_directory import PendingLooks
from vllm_multilora.integration.server.names.public_names import is_reserved, public_names
from vllm_multilora.integration.server.names.refusals import REFUSALS, Refusals
from vllm_multilora.integration.server.names.sources import source_names
from vllm_multilora.integration.server.requests import callers

logger = logging.getLogger(__name__)

_LOOKS = PendingLooks(ThreadPoolExecutor(4, thread_name_prefix="multilora-resolver"), limit_s=5.0)


async def find(models: Any, name: str) -> ErrorResponse | None:
    """Sees to it that an adapter is served, if there is one of this name.

    Those of adapter directories come first, then URLs; then vLLM's resolvers are asked.

    Returns:
        The answer to the request where it cannot be served.
    """
    if is_reserved(models, name):
        return registration.no_such_name(name, "is a kind of message part", "model")
    refusal = await adapter_directory.prepare(models, name)
    if refusal is None and name not in public_names(models):
        refusal = await prepare(models, name)
    await source_names.look_again(models, name)
    return refusal


async def prepare(models: Any, name: str) -> ErrorResponse | None:
    """Has resolvers find an adapter that nobody serves yet.

    Returns:
        The answer to the request where none finds it, or the engine refuses it; None where it
        serves from now on, or resolvers have no say.
    """
    if not (registration.acts_for(models) and source_names.resolvers_of(models)):
        return None
    async with callers.turn_to_read(), registration.lock_of(models, name):
        if models.is_base_model(name) or name in public_names(models):
            return None
        refusals = REFUSALS.get_or_make(models, Refusals)
        if (refusal := refusals.find(name)) is not None:
            return refusal
        refusal = await registration.to_its_end(_resolve(models, name))
        if refusal is None:
            refusals.forget(name)
        elif refusal.error.code != HTTPStatus.NOT_FOUND:
            refusals.remember(name, refusal)
        return refusal


async def _resolve(models: Any, name: str) -> ErrorResponse | None:
    first: ErrorResponse | None = None
    for resolver in source_names.resolvers_of(models) if not name.startswith("/") else ():
        kind = type(resolver).__name__
        try:
            lora = await _ask(resolver, models, name)
        except Exception as error:  # a resolver is anybody's code, and reads anybody's files
            logger.warning("%s cannot tell of %r: %s", kind, name, describe_failure(error)[:500])
            refusal: ErrorResponse | None = registration.error_response(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"adapter {name!r}: its resolver, {kind}, has failed; the server's log says why",
                param="model",
            )
        else:
            if lora is None:
                continue
            if (full := registration.one_too_many(models, name, "model")) is not None:
                return full
            lora.lora_int_id = models.lora_id_counter.inc(1)
            refusal = await registration.admit(models, lora, "model")
            if refusal is None:
                await registration.serve(models, lora)
                logger.info("Resolved and loaded LoRA adapter %r by %s", name, kind)
                return None
            registration.without_waiting(registration.remove(models, lora))
        first = first or refusal
    return first or registration.error_response(
        HTTPStatus.NOT_FOUND, registration.no_such_model(models, name), param="model"
    )


async def _ask(resolver: Any, models: Any, name: str) -> LoRARequest | None:
    base = models.model_config.model
    if type(resolver) is not FilesystemResolver:
        found: LoRARequest | None = await resolver.resolve_lora(base, name)
        return found
    settings = settings_of(models.engine_client.vllm_config)
    return await _LOOKS.wait(_look, resolver, base, name, settings)


def _look(
    resolver: FilesystemResolver, base: str, name: str, settings: MultiLoRAConfig
) -> LoRARequest | None:
    """Has the resolver look below its folder, or the allowed ones, at a file that can be read."""
    if os.path.normpath(name) != name:
        return None  # another name of a folder that has one
    folder = resolver.lora_cache_dir
    path = f"{folder}/{name}"
    roots = AllowedRoots(settings.allowed_roots, [*settings.directories, folder])
    if not (roots.allows(path) and roots.allows(f"{path}/{CONFIG_NAME}")):
        return None
    try:
        status = os.stat(f"{path}/{CONFIG_NAME}")  # noqa: PTH116 (no path to look up)
        # A pipe would hold this thread, and what is larger the interpreter.
        if stat.S_ISREG(status.st_mode) and status.st_size <= DEFAULT_LIMITS.config_bytes:
            return asyncio.run(resolver.resolve_lora(base, name))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    # The engine says what is wrong with it.
    return LoRARequest(lora_name=name, lora_int_id=1, lora_path=path)
