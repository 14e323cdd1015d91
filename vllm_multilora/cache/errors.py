"""What the cache refuses, and why; each message says what to raise or to do."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_multilora.errors import MultiLoRAError


class CacheError(MultiLoRAError):
    """Base class of the cache's refusals; after one the cache is consistent."""


class UnknownAdapterError(CacheError, LookupError):
    """An adapter was named that is not registered."""

    def __init__(self, adapter_id: int):
        super().__init__(f"adapter {adapter_id} is not registered; register it first")
        self.adapter_id = adapter_id


class MissingAdaptersError(CacheError):
    """A step names adapters that have no host copy.

    Attributes:
        adapter_ids: Those adapters, ascending.
    """

    def __init__(self, states: Iterable[tuple[int, str]]):
        found = tuple(states)
        listed = ", ".join(f"{adapter_id} ({state})" for adapter_id, state in found)
        super().__init__(
            f"the step needs adapters that are not in host memory: {listed}; load them before "
            "the step"
        )
        self.adapter_ids = tuple(adapter_id for adapter_id, _ in found)


class SlotsExhaustedError(CacheError):
    """A step needs more slots than there are or than may be given up."""


class CacheFullError(CacheError):
    """No room in host memory, and not enough adapters that may be evicted."""


class AdapterInUseError(CacheError):
    """An adapter cannot be removed now: a step or a request uses it."""


class PinLimitError(CacheError):
    """One pin more would leave no slot for the other adapters."""


class PolicyError(CacheError, ValueError):
    """A cache policy does not exist, lacks a method or chose no candidate."""
