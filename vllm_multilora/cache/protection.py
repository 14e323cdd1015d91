"""Which adapters may not be given up, and on whose account."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_multilora.cache.errors import AdapterInUseError, CacheError, PinLimitError


class Protection:
    """The step's adapters, those held by requests in flight, and the pinned ones.

    Args:
        slots: Slots of the GPU tier; at most one fewer adapters can be pinned.
    """

    def __init__(self, slots: int) -> None:
        self._pin_limit = slots - 1
        self.step: frozenset[int] = frozenset()
        self._holds: dict[int, int] = {}
        self._pins: set[int] = set()

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self.step or self.is_kept(adapter_id)

    def is_kept(self, adapter_id: int) -> bool:
        """Whether the adapter is held or pinned, whatever the step."""
        return adapter_id in self._holds or adapter_id in self._pins

    @property
    def pinned(self) -> frozenset[int]:
        return frozenset(self._pins)

    def holds(self, adapter_id: int) -> int:
        return self._holds.get(adapter_id, 0)

    def hold(self, adapter_id: int) -> None:
        self._holds[adapter_id] = self.holds(adapter_id) + 1

    def release(self, adapter_id: int) -> None:
        count = self.holds(adapter_id)
        if not count:
            raise CacheError(
                f"adapter {adapter_id} is released more often than it was held; every release "
                "needs its hold"
            )
        if count == 1:
            del self._holds[adapter_id]
        else:
            self._holds[adapter_id] = count - 1

    def pin(self, adapter_id: int) -> None:
        if adapter_id not in self._pins and len(self._pins) >= self._pin_limit:
            pinned = ", ".join(map(str, sorted(self._pins))) or "none"
            raise PinLimitError(
                f"adapter {adapter_id} cannot be pinned: with {self._pin_limit + 1} slots at most "
                f"{self._pin_limit} adapters can be, so that one slot serves all others (pinned: "
                f"{pinned}); unpin one or raise --max-loras"
            )
        self._pins.add(adapter_id)

    def unpin(self, adapter_id: int) -> None:
        self._pins.discard(adapter_id)

    def require_removable(self, adapter_id: int) -> None:
        """Raises `AdapterInUseError` if a step or a request uses the adapter; a pin does not."""
        if adapter_id in self.step:
            raise AdapterInUseError(
                f"adapter {adapter_id} cannot be removed: the current step uses it; remove it "
                "after the step has ended"
            )
        if self.holds(adapter_id):
            raise AdapterInUseError(
                f"adapter {adapter_id} cannot be removed: {self.holds(adapter_id)} requests in "
                "flight hold it; remove it when they have ended"
            )

    def describe(self, adapter_ids: Iterable[int]) -> str:
        """Why these adapters are kept, each counted under its first reason."""
        step = held = pinned = 0
        for adapter_id in adapter_ids:
            if adapter_id in self.step:
                step += 1
            elif adapter_id in self._holds:
                held += 1
            elif adapter_id in self._pins:
                pinned += 1
        return f"{step} in the current step, {held} held by requests in flight, {pinned} pinned"
