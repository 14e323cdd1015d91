"""The URLs of `--multilora-adapter-dir`: adapters below them are served by name.

A name is looked for on its first use, and served from then on as a registered one is. Sources are
not listed; while an adapter is used, its own is asked from time to time for another version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import msgspec
from vllm import envs
from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.directory import is_adapter_name
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.names.public_names import public_names
from vllm_multilora.sources.source_errors import SourceError
from vllm_multilora.sources.source_url import SourceUrl

logger = logging.getLogger(__name__)

SOURCES: Attached[SourceNames] = Attached("source-names")
"""What looks below URLs for vLLM's `OpenAIServingModels`, where the settings name any."""

CHECK_S = 30.0
"""Seconds for which a version is not looked at again."""

_WAIT_S = 1.0  # for a look at what has not been used for long
_MAX_LOOKS = 4  # at a time


class SourceResolver:
    """Finds adapters below one URL, as vLLM's resolvers do; the engine says whether they exist."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def path_of(self, name: str) -> str | None:
        """The one URL that has a name as its last part."""
        path = f"{self._url}/{name}"
        try:
            is_its = SourceUrl.parse(path).parts[-1:] == (name,) == (unquote(name),)
        except SourceError:
            return None
        return path if is_its and is_adapter_name(name) else None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        path = self.path_of(lora_name)
        return None if path is None else LoRARequest(lora_name, 1, path)


class SourceNames:
    """Serves adapters below URLs for one API server; used on its event loop only."""

    def __init__(self, models: Any, resolvers: list[SourceResolver]) -> None:
        self._models = models
        self.resolvers = resolvers
        self._looked: dict[str, float] = {}
        self._looks: set[str] = set()

    async def look_again(self, name: str) -> None:
        """Has an adapter's URL looked at, if that was long ago; waits for it if very long ago."""
        now, lora = time.monotonic(), public_names(self._models).get(name)
        age = now - self._looked.get(name, now)
        if lora is None or "://" not in lora.lora_path:
            return
        if name in self._looked and age < CHECK_S:
            return
        if all(lora.lora_path != each.path_of(name) for each in self.resolvers):
            return
        self._looked.setdefault(name, now)
        if age >= CHECK_S and name not in self._looks and len(self._looks) < _MAX_LOOKS:
            look = registration.in_background(self._look(lora))
            if age >= 2 * CHECK_S:
                await asyncio.wait({look}, timeout=_WAIT_S)

    async def _look(self, lora: LoRARequest) -> None:
        name = lora.lora_name
        self._looks.add(name)
        try:
            await self._replace(lora)
        except Exception:
            logger.exception("Adapter %s could not be looked at.", name)
        finally:
            self._looks.discard(name)
            self._looked[name] = time.monotonic()

    async def _replace(self, lora: LoRARequest) -> None:
        """Has the engine read what is at an adapter's URL now, and serves it if it is another."""
        models, client, name = self._models, self._models.engine_client, lora.lora_name
        found = msgspec.structs.replace(lora, lora_int_id=models.lora_id_counter.inc(1))
        refusal = await registration.admit(models, found, "model")
        if not registration.is_current(models, lora):
            pass
        elif refusal is None:
            before, now = (registered_versions.find(client, one) for one in (lora, found))
            if not (before and now and before.digest == now.digest):
                await registration.serve(models, found)
                logger.info("Serving a new version of %s", lora.lora_path)
                return
        elif refusal.error.code == HTTPStatus.NOT_FOUND:
            logger.info("No longer there: %s", lora.lora_path)
            await registration.unload_adapter(models, UnloadLoRAAdapterRequest(lora_name=name))
        else:
            logger.warning("%s stays as it is: %s", name, refusal.error.message[:500])
        await registration.remove(models, found)


def start(models: Any) -> None:
    """Serves adapters by name below the URLs that the settings name, if they name any."""
    if not registration.acts_for(models):
        return
    settings = settings_of(models.engine_client.vllm_config)
    if urls := [url for url in settings.adapter_dir if url not in settings.directories]:
        SOURCES.set(models, SourceNames(models, [SourceResolver(url) for url in urls]))


async def look_again(models: Any, name: str) -> None:
    if (sources := SOURCES.get(models)) is not None:
        await sources.look_again(name)


def resolvers_of(models: Any) -> list[Any]:
    """Who finds adapters by name: what looks below URLs, then vLLM's resolvers, if it asks them."""
    sources = SOURCES.get(models)
    is_on = envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING
    return [*(sources.resolvers if sources else ()), *(models.lora_resolvers if is_on else ())]
