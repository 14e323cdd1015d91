"""What an engine core's adapters talk to: the store, and the engine's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vllm_multilora.integration.worker_link.fill_link import Answer
from vllm_multilora.integration.worker_link.orders import Order
from vllm_multilora.store.protocol.messages import ToUser, Want


class Store(Protocol):
    """What is asked of the store; `StoreClient` is one. Nothing but `poll` ever waits."""

    def want(self, want: Want) -> int:
        """Asks for an adapter; returns the ticket that the answer names."""

    def share(self, ticket: int, owner: str) -> None:
        """Another owner waits for what a want has asked for."""

    def cancel(self, ticket: int) -> None:
        """Takes a want back."""

    def release(self, pack: int) -> None:
        """Gives the lease on a pack back."""

    def used(self, packs: Sequence[int]) -> None:
        """Steps use these packs: they are worth keeping."""

    def forget(self, adapter: int) -> None:
        """The adapter was withdrawn."""

    def poll(self, seconds: float = 0.0) -> list[ToUser]:
        """What the store has said since; waits at most so long for something, if it can."""


class Workers(Protocol):
    """The engine's workers."""

    def send(self, orders: list[Order]) -> None:
        """Has all workers begin with orders, after the steps that they have."""

    def poll(self, seconds: float = 0.0) -> list[tuple[int, Answer]]:
        """What workers have answered since, each with its rank; waits at most so long, likewise."""
