"""Registrations that hold in all API servers of a server, through the store.

With several API servers, each has its own table of names. What one of them registers or unloads is
in the others' tables by the time it answers, and all of them give an adapter the same number.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.server.names.public_names import public_names
from vllm_multilora.integration.server.requests.http_calls import GRACE_S
from vllm_multilora.integration.updating import SERVER_VARIABLE, UPDATING_VARIABLE
from vllm_multilora.store.clients.names_client import NamesClient
from vllm_multilora.store.protocol.messages import Published, Retracted, Settled
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.store_launch import StoreProcess

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

NAMES: Attached[SharedNames] = Attached("names")
"""What shares the names of vLLM's `OpenAIServingModels` with other API servers."""

_SETTLE_LIMIT_S = 5.0


class SharedNames:
    """One API server's view, by a client of the store; for its event loop only."""

    def __init__(self, models: Any, client: NamesClient) -> None:
        self._models = models
        self._client = client
        self._unsettled: dict[int, asyncio.Future[None]] = {}
        self._unwatch: Callable[[], object]
        self._watch()

    async def publish(self, lora: LoRARequest) -> None:
        """An adapter was registered here; returns when all API servers serve it.

        If another one was registered elsewhere meanwhile under its name, all serve the one that
        came to the store last.
        """
        details: dict[str, str | bool] = {"is_3d_lora_weight": bool(lora.is_3d_lora_weight)}
        if lora.base_model_name is not None:
            details["base_model_name"] = lora.base_model_name
        version = registered_versions.find(self._models.engine_client, lora)
        if version is not None:
            details |= {
                "digest": version.digest,
                "loaded": str(version.loaded),
                "kind": version.kind,
                "invocation": version.invocation_text,
            }
        await self._settle(
            self._client.publish(lora.lora_name, lora.lora_int_id, lora.lora_path, details)
        )

    async def retract(self, lora: LoRARequest) -> None:
        """An adapter was unloaded here; returns when no API server has it any more."""
        await self._settle(self._client.retract(lora.lora_name, lora.lora_int_id))

    async def _settle(self, request: int) -> None:
        if self._client.fileno() != self._watched:  # the store has died
            self._unwatch()
            self._watch()
        future = self._unsettled[request] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait_for(future, _SETTLE_LIMIT_S)
        except TimeoutError:
            logger.warning("The store has not said that all API servers know of a change.")
        finally:
            self._unsettled.pop(request, None)

    def _watch(self) -> None:
        """Has the event loop look at the socket, or for a store again where there is none."""
        loop = asyncio.get_running_loop()
        self._watched = self._client.fileno()
        if self._watched >= 0:
            loop.add_reader(self._watched, self._hear)
            self._unwatch = partial(loop.remove_reader, self._watched)
        else:
            self._unwatch = loop.call_later(self._client.pause_s, self._hear).cancel

    def _hear(self) -> None:
        self._unwatch()  # before its number can become another socket's
        try:
            for message in self._client.poll():
                if not isinstance(message, Settled):
                    self._take(message)
                    if message.serial:
                        self._client.saw(message.serial)
                elif (future := self._unsettled.get(message.request)) and not future.done():
                    future.set_result(None)
        finally:
            self._watch()

    def _take(self, message: Published | Retracted) -> None:
        table = public_names(self._models)
        before = table.get(message.name)
        is_there = before is not None and before.lora_int_id == message.adapter
        if is_there == isinstance(message, Published):
            return  # as this server has it already
        if isinstance(message, Retracted):
            del table[message.name]
            self._forget(message.adapter)
            return
        if before is not None:  # whose requests may be on their way
            loop = asyncio.get_running_loop()
            loop.call_later(GRACE_S, self._forget, before.lora_int_id)
        details: Any = message.details
        if "digest" in details:
            loaded, kind = float(details["loaded"]), details["kind"]
            tokens = registered_versions.read_invocation(details["invocation"])
            version = registered_versions.Version(details["digest"], loaded, kind, tokens)
            registered_versions.note(self._models.engine_client, message.adapter, version)
        table[message.name] = LoRARequest(
            lora_name=message.name,
            lora_int_id=message.adapter,
            lora_path=message.path,
            base_model_name=details.get("base_model_name"),
            is_3d_lora_weight=bool(details.get("is_3d_lora_weight")),
        )

    def _forget(self, adapter: int) -> None:
        if all(lora.lora_int_id != adapter for lora in public_names(self._models).values()):
            registered_versions.forget(self._models.engine_client, adapter)


def start(models: Any) -> None:
    vllm_config: VllmConfig = models.engine_client.vllm_config
    parallel = vllm_config.parallel_config
    server = os.environ.get(SERVER_VARIABLE)
    if parallel._api_process_count <= 1 or server is None or UPDATING_VARIABLE not in os.environ:
        return
    # Never two servers' alike, though each registration, refused ones too, takes another.
    own = FIRST_NUMBER // parallel._api_process_count
    models.lora_id_counter.inc(own * parallel._api_process_rank)
    try:
        client = NamesClient(StoreProcess(), server, parallel._api_process_count)
        NAMES.set(models, SharedNames(models, client))
    except StoreUnavailableError as error:
        logger.error("Registrations hold in one API server only: %s", error)


async def publish(models: Any, lora: LoRARequest) -> None:
    if (names := NAMES.get(models)) is not None:
        await names.publish(lora)


async def retract(models: Any, lora: LoRARequest) -> None:
    if (names := NAMES.get(models)) is not None:
        await names.retract(lora)
