"""Exceptions of slots and host memory; each message says what to raise or to do."""

from __future__ import annotations

from vllm_multilora.errors import MultiLoRAError


class SlotsError(MultiLoRAError):
    """Base class of these refusals; after one nothing has changed."""


class HostMemoryFullError(SlotsError):
    """No room in host memory, and not enough packs that may be evicted."""


class PinLimitError(SlotsError, RuntimeError):
    """One pin more would leave no slot for the other adapters; a RuntimeError, as vLLM's own."""


class PolicyError(SlotsError, ValueError):
    """A policy does not exist, lacks a method or chose no candidate."""
