"""A store that a worker asks directly while its engine waits; see `engine.workers.workers`."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.failures import FailureKind
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import (
    Failed,
    Loaded,
    LoadRequest,
    PackInfo,
    Restarted,
    StoreSettings,
    ToUser,
)

_MARGIN_S = 10.0  # beyond the store's own limit for one adapter: others may be before it


class OwnStore:
    """Loads adapters for one worker.

    What the engine core calls a pack is the ticket with which it was loaded: the same for all
    workers, whatever their stores call it.

    Raises:
        StoreUnavailableError: There is no store, and none can be started.
    """

    def __init__(
        self, mode: str, server: str, layout: ModelLayout, settings: StoreSettings
    ) -> None:
        self._client = StoreClient.connect(mode, server)  # type: ignore[arg-type]
        self._client.configure([layout], settings)
        self.address = self._client.address
        self._limit_s = settings.timeout_s + _MARGIN_S
        self._packs: dict[int, PackInfo] = {}

    def load(self, load_request: LoadRequest) -> Loaded | Failed:
        """Loads an adapter; returns the store's answer, with the engine core's numbers in it."""
        ticket = load_request.ticket
        own = self._client.request_load(load_request)
        deadline = time.monotonic() + self._limit_s
        while (left := deadline - time.monotonic()) > 0:
            answer = self._take(self._client.poll(left), own)
            if isinstance(answer, Failed):
                return msgspec.structs.replace(answer, ticket=ticket)
            if answer is not None:
                # Without a lease the pack may be gone when a slot is to be filled from it.
                pack = msgspec.structs.replace(answer.pack, pack=ticket if answer.leased else 0)
                if answer.leased:
                    self._packs[ticket] = answer.pack
                return msgspec.structs.replace(answer, ticket=ticket, pack=pack)
        self._client.cancel(own)
        return Failed(
            ticket,
            FailureKind.TIMEOUT,
            f"the store of this worker's machine has not answered within {self._limit_s:g} s",
            [],
        )

    def _take(self, messages: Iterable[ToUser], own: int = 0) -> Loaded | Failed | None:
        """Takes in what the store says; returns the answer to a load request, if it is there.

        A store that was started again has none of the packs; wants go on.
        """
        answer: Loaded | Failed | None = None
        for message in messages:
            if isinstance(message, Restarted):
                self._packs.clear()
            elif isinstance(message, Loaded | Failed) and message.ticket == own:
                answer = message
        return answer

    def pack(self, number: int) -> PackInfo | None:
        """What the worker's own store calls a pack of the engine core's; None if it has gone."""
        self._take(self._client.poll())
        return self._packs.get(number)

    def release(self, number: int) -> None:
        pack = self._packs.pop(number, None)
        if pack is not None:
            self._client.release(pack.pack)

    def forget(self, adapter: int) -> None:
        self._client.forget(adapter)
        self._take(self._client.poll())
