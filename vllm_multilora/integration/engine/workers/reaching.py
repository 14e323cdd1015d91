"""Finds the machines that an engine's workers are on, and connects the engine core to them."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.utils.network_utils import get_ip

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.integration.worker_link.fill_link import FillLink
from vllm_multilora.integration.worker_link.remote_link import Purpose, RemoteAcceptor
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)

REACHED: Attached[list[RemoteMachine]] = Attached("reached")
"""The other machines that an executor's workers are on, where they can be heard."""

_ARRIVAL_LIMIT_S = 10.0


class RemoteStore:
    """The store of another machine, as a `StoreHost`: a worker there brings it here."""

    def __init__(
        self, acceptor: RemoteAcceptor, rank: int, address: str, first: socket.socket
    ) -> None:
        self._acceptor = acceptor
        self._rank = rank
        self._first: socket.socket | None = first
        self.path = Path(address.removeprefix("unix:"))

    def connect(self) -> socket.socket:
        connection, self._first = self._first or self._acceptor.take("store", self._rank), None
        if connection is None:
            raise StoreUnavailableError(
                f"worker {self._rank} has not connected the store of its machine"
            )
        return connection

    def last_words(self) -> str:
        return f"see the log of worker {self._rank}'s machine, and the store's own there"


@dataclass(frozen=True)
class RemoteMachine:
    """Another machine."""

    ranks: list[int]
    address: str
    store: RemoteStore


def reach(
    executor: Any, link: FillLink, ranks: list[int], vllm_config: VllmConfig
) -> list[RemoteMachine] | None:
    """Connects workers that are not on this machine; None, and nothing, if one is out of reach."""
    try:
        acceptor = RemoteAcceptor(get_ip())  # where vLLM's own messages between machines go
    except OSError as error:
        logger.warning("Other machines cannot connect to this one: %s", error)
        return None
    machines = None
    try:
        machines = _connect(executor, link, ranks, acceptor, settings_of(vllm_config).store)
    except OSError as error:
        logger.warning("Workers on other machines are not heard: %s", error)
    finally:
        if machines is None:
            acceptor.close()
    return machines


def _connect(
    executor: Any, link: FillLink, ranks: list[int], acceptor: RemoteAcceptor, mode: str
) -> list[RemoteMachine] | None:
    found = executor.collective_rpc(worker_calls.reach_engine_core, args=(acceptor.address,))
    if any(found[rank] is None for rank in ranks):
        return None
    members: dict[str, list[int]] = {}
    for rank in ranks:
        members.setdefault(found[rank], []).append(rank)
    leads = [workers[0] for workers in members.values()]
    addresses = executor.collective_rpc(
        worker_calls.relay_store, args=(acceptor.address, leads, mode)
    )
    if any(addresses[lead] is None for lead in leads):
        return None
    fills = {rank: _await(acceptor, "fills", rank) for rank in ranks}
    stores = {lead: _await(acceptor, "store", lead) for lead in leads}
    for rank, connection in fills.items():
        link.adopt(rank, connection)
    return [
        RemoteMachine(
            workers, addresses[lead], RemoteStore(acceptor, lead, addresses[lead], stores[lead])
        )
        for workers, lead in zip(members.values(), leads, strict=True)
    ]


def _await(acceptor: RemoteAcceptor, purpose: Purpose, rank: int) -> socket.socket:
    """A connection that a worker has made; its greeting may still be on its way."""
    deadline = time.monotonic() + _ARRIVAL_LIMIT_S
    while (connection := acceptor.take(purpose, rank)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"worker {rank} has connected but sent nothing")
        time.sleep(0.01)
    return connection
