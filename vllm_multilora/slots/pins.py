"""Pins: adapters that keep their slots, by the settings or by a call."""

from __future__ import annotations

from collections.abc import Collection

from vllm_multilora.errors import ConfigError, MultiLoRAError
from vllm_multilora.wording import counted


class PinLimitError(MultiLoRAError, RuntimeError):
    """One pin more would leave no slot for the other adapters; a RuntimeError, as vLLM's own."""


class Pins:
    """Which adapters are pinned; at most one fewer than there are slots.

    The settings pin by name, and an adapter's number is known only once somebody asks for it: a
    name has its place among the pins from the start. An adapter that is pinned by name and by a
    call has one pin. Of a name that is given to a new version, only the new version is pinned; if
    that leaves, the one before is pinned again, which serves on where the new one was refused.

    Raises:
        ConfigError: The settings pin as many adapters as there are slots.
    """

    def __init__(self, slots: int, names: Collection[str] = ()) -> None:
        self._limit = slots - 1
        self._numbers_of: dict[str, list[int]] = {name: [] for name in sorted(names)}
        if len(self._numbers_of) > self._limit:
            raise ConfigError(
                f"the settings pin {counted(len(self._numbers_of), 'adapter')}, and of "
                f"{counted(slots, 'slot')} one must stay free for all others: raise --max-loras or "
                "pin fewer adapters with --multilora-pin"
            )
        self._called: set[int] = set()

    def __contains__(self, adapter_id: int) -> bool:
        return adapter_id in self._called or adapter_id in self._named()

    @property
    def adapters(self) -> frozenset[int]:
        """The pinned adapters whose numbers are known."""
        return frozenset(self._called | self._named())

    @property
    def places(self) -> int:
        """Slots that are set aside for pinned adapters, those that never came among them."""
        return len(self._numbers_of) + len(self._called - self._named())

    def note(self, adapter_id: int, name: str) -> bool:
        """Tells which number an adapter has; whether the settings pin it.

        Of several numbers of one name the latest is the pinned one, whoever pinned those before.
        """
        if name not in self._numbers_of:
            return False
        self._called.difference_update(self._numbers_of[name])
        self._numbers_of[name].append(adapter_id)
        return True

    def pin(self, adapter_id: int) -> None:
        """Pins an adapter; a second pin is none; `PinLimitError`: no more slot can be set aside."""
        if adapter_id not in self and self.places >= self._limit:
            pinned = ", ".join(map(str, sorted(self.adapters))) or "none"
            waiting = [name for name, numbers in self._numbers_of.items() if not numbers]
            reserved = f"; reserved by the settings: {', '.join(waiting)}" if waiting else ""
            raise PinLimitError(
                f"adapter {adapter_id} cannot be pinned: of {counted(self._limit + 1, 'slot')} one "
                f"must stay free for all others (pinned: {pinned}{reserved}); unpin one or raise "
                "--max-loras"
            )
        self._called.add(adapter_id)

    def unpin(self, adapter_id: int) -> None:
        """Takes back the pin of a call, if there is one; the settings' pins stay."""
        self._called.discard(adapter_id)

    def forget(self, adapter_id: int) -> None:
        """The adapter was unloaded: its pin goes, its name keeps the settings' one."""
        self._called.discard(adapter_id)
        for numbers in self._numbers_of.values():
            if adapter_id in numbers:
                numbers.remove(adapter_id)

    def _named(self) -> set[int]:
        return {numbers[-1] for numbers in self._numbers_of.values() if numbers}
