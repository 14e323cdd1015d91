"""Carries out the store's decisions, and tells clients about them."""

from __future__ import annotations

from typing import Protocol

from vllm_multilora.store.memory.entries import Client, Load, Pack, Ticket
from vllm_multilora.store.memory.held_packs import HostMemory
from vllm_multilora.store.protocol.job_messages import Failure, ToJob
from vllm_multilora.store.protocol.messages import (
    Evicted,
    Failed,
    Loaded,
    Message,
    PackInfo,
    Reading,
)


class Effects(Protocol):
    """What a registry asks for."""

    def send(self, client: int, message: Message) -> None:
        """Tells a client."""

    def start(self, load: Load) -> None:
        """Starts a load's job."""

    def tell(self, job: int, message: ToJob, segments: tuple[int, ...]) -> None:
        """Tells a job, with the descriptors of segments."""

    def kill(self, job: int) -> None:
        """Ends a job that may be at work; `gone` follows when it cannot write any more."""

    def refusal(self, path: str) -> str | None:
        """Why no job is to be started for a folder; None: it may."""


class Answers:
    """Tells clients, by their numbers, what has become of their wants."""

    def __init__(self, clients: dict[int, Client], memory: HostMemory, effects: Effects) -> None:
        self._clients = clients
        self._memory = memory
        self._effects = effects
        memory.on_evicted = self._evicted

    def reading(self, ticket: Ticket) -> None:
        """Its adapter is being read."""
        self._effects.send(ticket.client, Reading(ticket.number))

    def loaded(self, ticket: Ticket, info: PackInfo, now: float, *, was_read: bool) -> None:
        """The want is fulfilled; counts its lease."""
        self._clients[ticket.client].loads.pop(ticket.number, None)
        if ticket.keep:
            self._memory.lease(info.pack)
            self._clients[ticket.client].leases[info.pack] += 1
        message = Loaded(ticket.number, info, now - ticket.arrived, was_read, ticket.keep)
        self._effects.send(ticket.client, message)

    def failed(self, ticket: Ticket, failure: Failure) -> None:
        """The want cannot be fulfilled."""
        self._clients[ticket.client].loads.pop(ticket.number, None)
        message = Failed(ticket.number, failure.kind, failure.message, failure.problems)
        self._effects.send(ticket.client, message)

    def _evicted(self, pack: Pack) -> None:
        # Whatever was bound to it is not told apart: it may not be bound any more.
        for client in self._clients.values():
            if client.scope == pack.scope:
                self._effects.send(client.number, Evicted(pack.info.pack))
