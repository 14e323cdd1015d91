"""The packs in host memory: what they are, who holds them, and which one is evicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.slots.policies.policy import CachePolicy, reload_cost
from vllm_multilora.store.memory.arena import Allocation, Arena, pages_of
from vllm_multilora.store.memory.entries import Binding, Owner, Pack, Scope
from vllm_multilora.store.protocol.messages import PackInfo, Totals

MAX_VERSIONS = 16
"""Versions of files that one pack is known to be equal to; those before are read again."""

MAX_LIMITS = 4096
"""Tenants whose limits are known; tenants come and go while a store runs."""


@dataclass
class HostMemory:
    """Packs by their numbers, and the room that jobs pack into.

    A pack that no adapter is bound to any more leaves as soon as nobody has a lease on it, unless
    it is kept for servers to come.

    Attributes:
        policy: Chooses victims; see `ContainedPolicy` for those that may fail.
        on_evicted: Told of each pack that leaves.
        budgets: Those that clients ask for: what is here keeps within one of them.
        tenant_limits: Packs that tenants may keep, as their servers have said last; newest last.
        staged: Allocations that jobs pack into, or that jobs which were killed may still write to.
        keeps: Whether packs of servers that have gone stay while there is room.
    """

    arena: Arena
    policy: CachePolicy
    numbers: Iterator[int]
    on_evicted: Callable[[Pack], None] = field(init=False)
    budgets: tuple[CpuBudget, ...] = (CpuBudget(),)
    tenant_limits: dict[tuple[Scope, Owner], int] = field(default_factory=dict)
    staged: int = 0
    keeps: bool = False
    packs: dict[int, Pack] = field(default_factory=dict)
    _by_version: dict[tuple[Scope, str], Pack] = field(default_factory=dict)
    _by_digest: dict[tuple[Scope, str], Pack] = field(default_factory=dict)
    _bound: dict[Binding, Pack] = field(default_factory=dict)
    _bindings_of: dict[tuple[str, int], set[Binding]] = field(default_factory=dict)

    def allow(self, budgets: Iterable[CpuBudget]) -> None:
        """What is here keeps within one of these budgets from now on.

        Where they are smaller than before, packs without leases leave until it does.
        """
        self.budgets = tuple(budgets)
        self.arena.budget = _largest(budget.bytes for budget in self.budgets)
        while not self.fits(self._count, self.arena.held) and self._evict_one():
            pass

    def fits(self, adapters: int, nbytes: int) -> bool:
        return any(budget.fits(adapters, nbytes) for budget in self.budgets)

    def totals(self) -> Totals:
        limit = _largest(budget.adapters for budget in self.budgets)
        return Totals(self.arena.held, self._count, self.arena.budget, limit)

    def of_version(self, scope: Scope, version: str) -> Pack | None:
        return self._by_version.get((scope, version))

    def of_digest(self, scope: Scope, digest: str) -> Pack | None:
        return self._by_digest.get((scope, digest))

    def of_adapter(self, binding: Binding, path: str) -> Pack | None:
        """The pack that an adapter is, if it was read from that folder."""
        pack = self._bound.get(binding)
        return pack if pack is not None and pack.bindings[binding] == path else None

    def room(self, blocks: NDArray[np.int64], *, evict: bool) -> Allocation | None:
        """Room for a job to pack into, to be given to `add` or `give_back`.

        Args:
            blocks: int64 [n], bytes of each block.
            evict: Whether packs without leases may leave for it; none does if that is not enough.

        Raises:
            OSError: The system gives no memory.
        """
        if not self._may_suffice(blocks):
            return None
        while True:
            is_allowed = self.fits(self._count + 1, self.arena.held + pages_of(blocks))
            allocation = self.arena.allocate(blocks) if is_allowed else None
            if allocation is not None:
                self.staged += 1
                return allocation
            if not evict or not self._evict_one():
                return None

    def may_vacate(self, nbytes: int) -> bool:
        """Whether there are packs without leases that take so many bytes."""
        idle = (pack for pack in self.packs.values() if not pack.leases)
        return sum(pack.allocation.held_bytes for pack in idle) >= nbytes

    def vacate(self, nbytes: int) -> None:
        """Has packs without leases leave that take so many bytes, as far as there are any.

        The system gets their pages, also of small ones, in whose place nothing else may fit.
        """
        most = self.arena.held - nbytes
        while self.arena.held > most and self._evict_one():
            pass
        self.arena.give_back_free()

    def give_back(self, allocation: Allocation) -> None:
        """A job has ended, and what it packed is of no use."""
        self.staged -= 1
        self.arena.free(allocation)

    def add(self, scope: Scope, info: PackInfo, allocation: Allocation) -> Pack:
        """What a job has packed is a pack now; its number is set here."""
        number = next(self.numbers)
        self.staged -= 1
        pack = Pack(msgspec.structs.replace(info, pack=number), scope, allocation)
        self.packs[number] = pack
        self._by_digest[scope, info.digest] = pack
        self.policy.added(number, allocation.held_bytes, reload_cost(allocation.held_bytes))
        return pack

    def bind(self, pack: Pack, binding: Binding, path: str, version: str) -> None:
        """An adapter is this pack from now on, read from files of this version."""
        if self._bound.get(binding) is not pack:
            self.unbind(binding)
        pack.bindings[binding] = path
        self._note_version(pack, version)
        self._bound[binding] = pack
        self._bindings_of.setdefault((binding.server, binding.adapter), set()).add(binding)

    def unbind(self, binding: Binding) -> None:
        """An adapter is withdrawn, or is another pack now."""
        pack = self._bound.get(binding)
        if pack is not None:
            self._take_off(binding)
            self._drop_if_useless(pack)

    def bound(self, server: str, adapter: int) -> dict[Binding, Pack]:
        """What an adapter's number means in a server, for each model and set of rules."""
        bindings = self._bindings_of.get((server, adapter), ())
        return {binding: self._bound[binding] for binding in bindings}

    def forget_server(self, server: str) -> None:
        for binding in [binding for binding in self._bound if binding.server == server]:
            if self.keeps:
                self._take_off(binding)
            else:
                self.unbind(binding)
        for key in [key for key in self.tenant_limits if key[1].server == server]:
            del self.tenant_limits[key]

    def lease(self, number: int) -> None:
        self.packs[number].leases += 1

    def release(self, number: int, leases: int = 1) -> None:
        pack = self.packs[number]
        pack.leases -= leases
        self._drop_if_useless(pack)
        self.keep_within(pack.scope, pack.tenant)

    def own(self, pack: Pack, tenant: Owner | None) -> None:
        """Somebody wants a pack: if it is no tenant's, it becomes this one's; None: no tenant.

        It may leave at once if it is not on lease.
        """
        if pack.tenant is None:
            pack.tenant = tenant
            self.keep_within(pack.scope, tenant)

    def limit(self, scope: Scope, tenant: Owner, most: int | None) -> None:
        """A tenant that wants a pack may keep so many; None: as many as there is room for."""
        self.tenant_limits.pop((scope, tenant), None)
        if most is not None:
            self.tenant_limits[scope, tenant] = most
        if len(self.tenant_limits) > MAX_LIMITS:
            del self.tenant_limits[next(iter(self.tenant_limits))]  # said again when it wants more

    def keep_within(self, scope: Scope, tenant: Owner | None, coming: int = 0) -> None:
        """Has a tenant's least valuable packs leave while it has more than its limit.

        What is on lease stays: the limit bounds what a tenant keeps, and fails no request.
        `coming` packs count as if they were here already.
        """
        if tenant is None or (most := self.tenant_limits.get((scope, tenant))) is None:
            return
        own = {n: p for n, p in self.packs.items() if p.tenant == tenant and p.scope == scope}
        idle = sorted(number for number, pack in own.items() if not pack.leases)
        for _ in range(min(len(own) + coming - most, len(idle))):
            victim = self.policy.victim(idle)
            idle.remove(victim)
            self._drop(self.packs[victim])

    def used(self, numbers: Iterable[int], joined: Iterable[int]) -> None:
        """A step uses these packs; those that are not here are left out."""
        here = sorted(number for number in numbers if number in self.packs)
        if here:
            self.policy.used(here, sorted(number for number in joined if number in self.packs))

    @property
    def _count(self) -> int:
        return len(self.packs) + self.staged

    def _may_suffice(self, blocks: NDArray[np.int64]) -> bool:
        """Whether there is room when everything without a lease has left."""
        idle = [pack.allocation.held_bytes for pack in self.packs.values() if not pack.leases]
        held = self.arena.held - sum(idle)
        return self.fits(self._count - len(idle) + 1, held + pages_of(blocks))

    def _evict_one(self) -> bool:
        candidates = sorted(number for number, pack in self.packs.items() if not pack.leases)
        if not candidates:
            return False
        self._drop(self.packs[self.policy.victim(candidates)])
        return True

    def _note_version(self, pack: Pack, version: str) -> None:
        """Files of this version are the pack; those without a version may be anything."""
        if not version:
            return
        pack.versions.pop(version, None)
        pack.versions[version] = None  # the newest is the last
        self._by_version[pack.scope, version] = pack
        if len(pack.versions) > MAX_VERSIONS:
            self._forget_version(pack, next(iter(pack.versions)))

    def _forget_version(self, pack: Pack, version: str) -> None:
        del pack.versions[version]
        if self._by_version.get((pack.scope, version)) is pack:
            del self._by_version[pack.scope, version]

    def _take_off(self, binding: Binding) -> None:
        """A binding is none any more; a pack without others of a server is none of its tenants'."""
        pack = self._bound.pop(binding)
        del pack.bindings[binding]
        servers = {other.server for other in pack.bindings}
        if pack.tenant is not None and pack.tenant.server not in servers:
            pack.tenant = None
        alike = self._bindings_of[binding.server, binding.adapter]
        alike.remove(binding)
        if not alike:
            del self._bindings_of[binding.server, binding.adapter]

    def _drop_if_useless(self, pack: Pack) -> None:
        if not pack.bindings and not pack.leases:
            self._drop(pack)

    def _drop(self, pack: Pack) -> None:
        number = pack.info.pack
        self.on_evicted(pack)
        del self.packs[number]
        for binding in list(pack.bindings):
            self._take_off(binding)
        for version in list(pack.versions):
            self._forget_version(pack, version)
        self._by_digest.pop((pack.scope, pack.info.digest), None)
        self.policy.removed(number)
        self.arena.free(pack.allocation)


def _largest(limits: Iterable[int | None]) -> int | None:
    found = list(limits)
    return None if None in found else max(limit for limit in found if limit is not None)
