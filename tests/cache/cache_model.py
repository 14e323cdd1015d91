"""A model of the cache that checks every decision instead of making any."""

from dataclasses import dataclass, field

from vllm_multilora.cache import Activation, AdapterState, Admission

DISK, LOADING, CPU, GPU, FAILED = (
    AdapterState.DISK,
    AdapterState.LOADING,
    AdapterState.CPU,
    AdapterState.GPU,
    AdapterState.FAILED,
)


@dataclass
class CacheModel:
    """What must be true, kept in the plainest way: one state, size and count an adapter."""

    slots: int
    most_adapters: int | None
    most_bytes: int | None
    states: dict[int, AdapterState] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    slot_of: dict[int, int] = field(default_factory=dict)
    holds: dict[int, int] = field(default_factory=dict)
    pins: set[int] = field(default_factory=set)
    step: set[int] = field(default_factory=set)

    def of_state(self, *states: AdapterState) -> list[int]:
        return sorted(i for i, state in self.states.items() if state in states)

    def kept(self, adapter_id: int) -> bool:
        return adapter_id in self.pins or self.holds.get(adapter_id, 0) > 0

    def protected(self, adapter_id: int) -> bool:
        return adapter_id in self.step or self.kept(adapter_id)

    def fits(self, adapters: list[int], size: int) -> bool:
        """Whether one more adapter of that size fits beside these."""
        total = sum(self.sizes[i] for i in adapters) + size
        return (self.most_adapters is None or len(adapters) < self.most_adapters) and (
            self.most_bytes is None or total <= self.most_bytes
        )

    def can_make_room(self, size: int) -> bool:
        return self.fits([i for i in self.sizes if self.protected(i)], size)

    def admit(self, adapter_id: int, size: int, evict: bool, admission: Admission) -> None:
        """Checks an admission and takes it over."""
        if not evict:
            assert not admission.evicted
            assert admission.admitted == self.fits(list(self.sizes), size)
        else:
            assert admission.admitted
        for number, victim in enumerate(admission.evicted):
            assert not self.protected(victim)
            assert not self.fits(list(self.sizes), size), f"victim {number} was not needed"
            if victim in self.slot_of:
                spared = [i for i in self.of_state(CPU) if not self.protected(i)]
                assert not spared, "an adapter left its slot while others without one stayed"
            self.slot_of.pop(victim, None)
            del self.sizes[victim]
            self.states[victim] = DISK
        self.states[adapter_id] = CPU if admission.admitted else DISK
        if admission.admitted:
            self.sizes[adapter_id] = size

    def displaceable(self, step: set[int]) -> list[int]:
        return [i for i in self.slot_of if i not in step and not self.kept(i)]

    def activate(self, step: set[int], activations: tuple[Activation, ...]) -> None:
        """Checks a step's activations and takes them over."""
        given = [activation.adapter_id for activation in activations]
        assert given == sorted(step - self.slot_of.keys())
        free = sorted(set(range(self.slots)) - set(self.slot_of.values()))
        assert [a.slot for a in activations if a.displaced is None] == free[: len(given)]
        displaceable = self.displaceable(step)
        displaced = [a for a in activations if a.displaced is not None]
        assert len(displaced) == max(0, len(given) - len(free))
        for activation in displaced:
            assert activation.displaced in displaceable
            displaceable.remove(activation.displaced)
            assert self.slot_of.pop(activation.displaced) == activation.slot
            self.states[activation.displaced] = CPU
        for activation in activations:
            assert activation.slot not in self.slot_of.values()
            self.slot_of[activation.adapter_id] = activation.slot
            self.states[activation.adapter_id] = GPU
        self.step = set(step)

    def place(self, adapter_id: int, activation: Activation | None) -> None:
        """Checks a placement ahead of a step and takes it over."""
        free = sorted(set(range(self.slots)) - set(self.slot_of.values()))
        idle = [i for i in self.slot_of if not self.protected(i)]
        if adapter_id in self.slot_of or adapter_id not in self.sizes or not (free or idle):
            assert activation is None
            return
        assert activation is not None
        assert activation.adapter_id == adapter_id
        if free:
            assert (activation.slot, activation.displaced) == (free[0], None)
        else:
            assert activation.displaced in idle
            assert self.slot_of.pop(activation.displaced) == activation.slot
            self.states[activation.displaced] = CPU
        self.slot_of[adapter_id] = activation.slot
        self.states[adapter_id] = GPU

    def clear_slots(self) -> None:
        for adapter_id in self.slot_of:
            self.states[adapter_id] = CPU
        self.slot_of.clear()

    def remove(self, adapter_id: int) -> int | None:
        del self.states[adapter_id]
        self.sizes.pop(adapter_id, None)
        self.pins.discard(adapter_id)
        return self.slot_of.pop(adapter_id, None)
