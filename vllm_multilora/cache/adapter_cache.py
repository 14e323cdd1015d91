"""The adapter cache: which adapters are in host memory, which in slots, and who must go.

Pure decisions, deterministic in the calls made: the ranks of a tensor-parallel group that make
the same calls with the same sizes evict the same adapters. One caller at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vllm_multilora.cache.budget import CpuBudget
from vllm_multilora.cache.cpu_tier import CpuTier
from vllm_multilora.cache.decisions import Activation, Admission
from vllm_multilora.cache.errors import CacheError, MissingAdaptersError, UnknownAdapterError
from vllm_multilora.cache.events import CacheEvents
from vllm_multilora.cache.gpu_tier import GpuTier
from vllm_multilora.cache.look_ups import LookUps
from vllm_multilora.cache.policy import CachePolicy
from vllm_multilora.cache.protection import Protection
from vllm_multilora.cache.registry import policy_factory
from vllm_multilora.cache.states import (
    AdapterState,
    IllegalTransitionError,
    Tier,
    require_transition,
)
from vllm_multilora.errors import ConfigError


class AdapterCache:
    """Adapters of one worker in a GPU tier of slots and a CPU tier with a budget.

    An adapter in a slot keeps its host copy, so the GPU tier is a part of the CPU tier, giving up
    a slot copies nothing, and evicting an adapter from host memory takes its slot too. Never a
    victim: an adapter of the current step, one held by a request in flight, a pinned one.

    Args:
        slots: Slots of the GPU tier (`--max-loras`).
        budget: Limits of the CPU tier.
        policy: Name of a policy (see `registry`) or what makes one; each tier gets its own.
        events: Told of hits, loads and evictions; by default nobody is.

    Raises:
        ConfigError: `slots` is no positive integer, or the budget holds fewer adapters.
        PolicyError: There is no such policy.
    """

    def __init__(
        self,
        *,
        slots: int,
        budget: CpuBudget,
        policy: str | Callable[[], CachePolicy] = "lru",
        events: CacheEvents | None = None,
    ) -> None:
        if isinstance(slots, bool) or not isinstance(slots, int) or slots < 1:
            raise ConfigError(f"the number of slots must be a positive integer, got {slots!r}")
        if budget.adapters is not None and budget.adapters < slots:
            raise ConfigError(
                f"the CPU tier must hold at least the adapters of all slots: {budget.adapters} "
                f"adapters are fewer than {slots} slots; raise --max-cpu-loras or lower "
                "--max-loras"
            )
        make = policy_factory(policy) if isinstance(policy, str) else policy
        self._events = events if events is not None else CacheEvents()
        self._gpu = GpuTier(make(), slots)
        self._cpu = CpuTier(make(), budget)
        self._protection = Protection(slots)
        self._look_ups = LookUps(self._events)
        self._states: dict[int, AdapterState] = {}
        self._failures: dict[int, str] = {}
        self._placed: frozenset[int] | None = None  # the step whose adapters have slots

    # What is where

    def state(self, adapter_id: int) -> AdapterState:
        """The adapter's state; `GONE` if it is not known."""
        return self._states.get(adapter_id, AdapterState.GONE)

    def slot_of(self, adapter_id: int) -> int | None:
        """The adapter's slot; None if it has none."""
        return self._gpu.slot_of.get(adapter_id)

    def size(self, adapter_id: int) -> int | None:
        """Bytes of the adapter's host copy; None if it has none."""
        return self._cpu.sizes.get(adapter_id)

    def failure(self, adapter_id: int) -> str | None:
        """Why the last load failed; None unless the adapter is in state `FAILED`."""
        return self._failures.get(adapter_id)

    def holds(self, adapter_id: int) -> int:
        """How many requests in flight hold the adapter."""
        return self._protection.holds(adapter_id)

    @property
    def slots(self) -> tuple[int | None, ...]:
        """The adapter in each slot."""
        return tuple(self._gpu.slots)

    @property
    def budget(self) -> CpuBudget:
        """The limits of the CPU tier."""
        return self._cpu.budget

    @property
    def cpu_bytes(self) -> int:
        """Bytes of all host copies, those of adapters in slots included."""
        return self._cpu.bytes

    @property
    def cpu_count(self) -> int:
        """Number of adapters with a host copy, those in slots included."""
        return len(self._cpu.sizes)

    @property
    def cpu_adapters(self) -> tuple[int, ...]:
        """Adapters with a host copy, those in slots included, ascending."""
        return tuple(sorted(self._cpu.sizes))

    @property
    def known(self) -> tuple[int, ...]:
        """All registered adapters, ascending."""
        return tuple(sorted(self._states))

    @property
    def pinned(self) -> frozenset[int]:
        return self._protection.pinned

    @property
    def in_step(self) -> frozenset[int]:
        """The adapters of the current or announced step."""
        return self._protection.step

    # From disk to host memory

    def register(self, adapter_id: int) -> None:
        """Makes an adapter known, on disk; one that is known already stays as it is."""
        if adapter_id not in self._states:
            self._move(adapter_id, AdapterState.DISK)

    def start_loading(self, adapter_id: int) -> None:
        """From disk, or after a failure, to loading.

        Raises:
            IllegalTransitionError: The adapter is in another state.
        """
        self._move(adapter_id, AdapterState.LOADING)
        self._failures.pop(adapter_id, None)

    def fail_loading(self, adapter_id: int, reason: str) -> None:
        """The load failed; the adapter may be loaded again.

        Raises:
            IllegalTransitionError: The adapter is not being loaded.
        """
        self._move(adapter_id, AdapterState.FAILED)
        self._failures[adapter_id] = reason
        self._events.load_failed(adapter_id, reason)

    def finish_loading(self, adapter_id: int, size: int, *, evict: bool) -> Admission:
        """The packed copy is there: takes it into the CPU tier if there is or can be room.

        Victims are adapters without a slot first, in the order of the CPU tier's policy, then
        adapters in slots. Nothing is evicted unless the room suffices in the end.

        Args:
            adapter_id: An adapter in state `LOADING`.
            size: Bytes of its host copy, positive; the same on all ranks.
            evict: Whether others may be evicted for it. True for an adapter that a request
                needs; False for one that is merely registered: without free room it goes back
                to disk.

        Raises:
            IllegalTransitionError: The adapter is not being loaded.
            CacheFullError: `evict` is set and too little can be evicted; the adapter is on disk
                again.
        """
        if size < 1:
            raise ValueError(f"the size of adapter {adapter_id} must be positive, got {size}")
        if self.state(adapter_id) is not AdapterState.LOADING:
            raise IllegalTransitionError(
                adapter_id, self.state(adapter_id), AdapterState.CPU, [AdapterState.LOADING]
            )
        if not evict and not self._cpu.has_room(size):
            self._move(adapter_id, AdapterState.DISK)
            return Admission(admitted=False)
        try:
            victims = self._cpu.victims(
                adapter_id, size, in_slots=self._gpu.slot_of, protection=self._protection
            )
        except CacheError:
            self._move(adapter_id, AdapterState.DISK)
            raise
        for victim in victims:
            self._evict(victim)
        self._move(adapter_id, AdapterState.CPU)
        self._cpu.take(adapter_id, size)
        if evict:
            self._look_ups.loaded_on_demand(adapter_id)
        self._events.loaded(adapter_id, size)
        return Admission(admitted=True, evicted=victims)

    # Steps

    def protect_step(self, adapter_ids: Iterable[int]) -> tuple[int, ...]:
        """Announces the coming step, so that loading for it evicts none of its adapters.

        They take the place of the preceding step's as the adapters in use.

        Returns:
            Those that have to be loaded before `begin_step`, ascending.

        Raises:
            UnknownAdapterError: One is not registered; nothing has changed.
        """
        step = frozenset(adapter_ids)
        for adapter_id in sorted(step):
            self._require_known(adapter_id)
        self._announce(step)
        return tuple(sorted(step.difference(self._cpu.sizes)))

    def begin_step(self, adapter_ids: Iterable[int]) -> tuple[Activation, ...]:
        """Gives every adapter of a step a slot and protects all of them until the next step.

        All are noted as used in both tiers before any victim is chosen. Free slots are taken
        lowest first, then those of the GPU policy's victims among adapters that are not of this
        step, not held and not pinned.

        Args:
            adapter_ids: The step's adapters, without the base model; all in the CPU or GPU tier.

        Returns:
            The copies to make before the step, in ascending order of the adapters.

        Raises:
            MissingAdaptersError: Some have no host copy; nothing has changed.
            SlotsExhaustedError: There are too few slots to give; nothing has changed.
        """
        step = frozenset(adapter_ids)
        if step == self._placed and step == self._protection.step:
            return ()
        # An adapter in a slot has its host copy, so only the others can be missing.
        unplaced = sorted(step.difference(self._gpu.slot_of))
        missing = [i for i in unplaced if i not in self._cpu.sizes]
        if missing:
            raise MissingAdaptersError((i, self.state(i).value) for i in missing)
        free = self._gpu.free_slots() if unplaced else []
        needed = max(0, len(unplaced) - len(free))
        candidates = self._gpu.candidates(step, needed, self._protection)

        self._announce(step)
        victims = self._gpu.victims(candidates, needed)
        self._look_ups.count(step, unplaced, self._gpu.slot_of)
        places: list[tuple[int, int | None]] = [(slot, None) for slot in free]
        places += [(self._leave_slot(victim, evicted=True), victim) for victim in victims]
        activations = tuple(
            Activation(adapter_id, slot, displaced)
            for adapter_id, (slot, displaced) in zip(unplaced, places, strict=False)
        )
        for activation in activations:
            self._take_slot(activation)
        self._gpu.report()
        self._placed = step
        return activations

    def place_ahead(self, adapter_id: int) -> Activation | None:
        """Gives an adapter a slot before a step needs it, at no other one's expense.

        Adapters of the current step, held and pinned ones keep theirs. Nothing holds the slot
        for the newcomer: a step that needs more slots than are left takes it again.

        Returns:
            The copy to make; None if the adapter has a slot already, has no host copy, or no slot
            can be spared.
        """
        if adapter_id in self._gpu.slot_of or adapter_id not in self._cpu.sizes:
            return None
        slot = self._gpu.spare_slot(self._protection)
        if slot is None:
            return None
        displaced = self._gpu.slots[slot]
        if displaced is not None:
            self._leave_slot(displaced, evicted=True)
        self._look_ups.count_ahead(adapter_id)
        activation = Activation(adapter_id, slot, displaced)
        self._take_slot(activation)
        return activation

    def end_step(self) -> None:
        """The step is over: its adapters are protected no longer."""
        self._protection.step = frozenset()

    def clear_slots(self) -> None:
        """The weights in all slots are lost (sleep, reload): every adapter there is in CPU only."""
        for adapter_id in sorted(self._gpu.slot_of):
            self._leave_slot(adapter_id)

    # Keeping and removing

    def hold(self, adapter_id: int) -> None:
        """A request in flight needs the adapter; counted, until as many releases.

        Raises:
            UnknownAdapterError: It is not registered.
        """
        self._require_known(adapter_id)
        self._protection.hold(adapter_id)

    def release(self, adapter_id: int) -> None:
        """Takes back one `hold`.

        Raises:
            CacheError: There is none.
        """
        self._protection.release(adapter_id)

    def pin(self, adapter_id: int) -> None:
        """Keeps the adapter in whatever tier it reaches; loads and activates nothing.

        Raises:
            UnknownAdapterError: It is not registered.
            PinLimitError: All slots but one could be taken by pinned adapters already.
        """
        self._require_known(adapter_id)
        self._protection.pin(adapter_id)

    def unpin(self, adapter_id: int) -> None:
        """Takes a pin back; nothing happens to an adapter that has none."""
        self._protection.unpin(adapter_id)

    def remove(self, adapter_id: int) -> int | None:
        """Forgets the adapter, pinned or not, whatever its state.

        Returns:
            The slot it had, now free; None if it had none.

        Raises:
            UnknownAdapterError: It is not registered.
            AdapterInUseError: The current step uses it or requests hold it.
        """
        self._require_known(adapter_id)
        self._protection.require_removable(adapter_id)
        slot = self._leave_slot(adapter_id) if adapter_id in self._gpu.slot_of else None
        if adapter_id in self._cpu.sizes:
            self._drop_host_copy(adapter_id)
        self._move(adapter_id, AdapterState.GONE)
        del self._states[adapter_id]
        self._failures.pop(adapter_id, None)
        self._protection.unpin(adapter_id)
        return slot

    # Private

    def _move(self, adapter_id: int, to: AdapterState) -> None:
        require_transition(adapter_id, self.state(adapter_id), to)
        self._states[adapter_id] = to
        self._events.moved(adapter_id, to)

    def _require_known(self, adapter_id: int) -> None:
        if adapter_id not in self._states:
            raise UnknownAdapterError(adapter_id)

    def _announce(self, step: frozenset[int]) -> None:
        self._protection.step = step
        self._cpu.announce(step)
        self._gpu.announce(step)

    def _take_slot(self, activation: Activation) -> None:
        adapter_id = activation.adapter_id
        self._move(adapter_id, AdapterState.GPU)
        self._gpu.take(adapter_id, activation.slot)
        self._look_ups.forget(adapter_id)
        self._events.activated(adapter_id, activation.slot, self._cpu.sizes[adapter_id])

    def _leave_slot(self, adapter_id: int, *, evicted: bool = False) -> int:
        self._move(adapter_id, AdapterState.CPU)
        slot = self._gpu.leave(adapter_id)
        self._look_ups.left_slot(adapter_id)
        self._placed = None
        if evicted:
            self._events.evicted(Tier.GPU, adapter_id)
        return slot

    def _drop_host_copy(self, adapter_id: int) -> None:
        self._cpu.drop(adapter_id)
        self._look_ups.forget(adapter_id)

    def _evict(self, adapter_id: int) -> None:
        if adapter_id in self._gpu.slot_of:
            self._leave_slot(adapter_id, evicted=True)
        self._drop_host_copy(adapter_id)
        self._move(adapter_id, AdapterState.DISK)
        self._events.evicted(Tier.CPU, adapter_id)
