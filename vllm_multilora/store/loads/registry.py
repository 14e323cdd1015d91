"""Who wants what: the store's decisions, without I/O or clock.

The owner of a `Registry` tells it what clients say and what time it is, tells its `loads` what
becomes of jobs, and carries out what both ask of `Effects`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm_multilora.adapters.blend import Blend, BlendError
from vllm_multilora.failures import FailureKind
from vllm_multilora.slots.budget import CpuBudget
from vllm_multilora.store.loads.loads import Effects, Loads
from vllm_multilora.store.memory.entries import Binding, Client, Owner, Pack, Scope, Ticket
from vllm_multilora.store.memory.held_packs import HostMemory
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.job_messages import Failure


class Registry:
    """All clients, what they want, and what they have."""

    def __init__(self, memory: HostMemory, effects: Effects) -> None:
        self.memory = memory
        self.clients: dict[int, Client] = {}
        self._effects = effects
        self.loads = Loads(self.clients, memory, effects)
        memory.on_evicted = self._evicted
        # By server and adapter, the clients that have forgotten an adapter that others still use.
        self._leaving: dict[tuple[str, int], set[int]] = {}

    def configure(
        self, number: int, model: str, layouts: Any, settings: msg.StoreSettings, now: float
    ) -> None:
        client = self.clients[number]
        client.scope = Scope(
            model,
            settings.allowed_roots,
            settings.directories,
            settings.allow_pickle,
            settings.check_finite,
            settings.signing_keys,
        )
        client.layouts, client.settings = layouts, settings
        self._apply_settings(now)

    def client_gone(self, number: int, now: float) -> None:
        """A connection has ended: its wants and leases with it."""
        for ticket in list(self.clients[number].loads):
            self.cancel(number, ticket, now)
        client = self.clients.pop(number)
        for pack, leases in client.leases.items():
            self.memory.release(pack, leases)
        if client.server not in {other.server for other in self.clients.values()}:
            self.memory.forget_server(client.server)
            self.loads.forget_server(client.server)
        self._unbind_unused()
        self._apply_settings(now)

    def request_load(self, number: int, load_request: msg.LoadRequest, now: float) -> None:
        client = self.clients[number]
        fresh = load_request.fresh
        if number in self._leaving.get((client.server, load_request.adapter), ()):
            # It has forgotten what it wants again. Others have that still; its files may have
            # changed since.
            del self._leaving[client.server, load_request.adapter]
            fresh = True
        ticket = Ticket(number, load_request.ticket, load_request.keep, now)
        if client.scope is None or load_request.ticket in client.loads:
            found = (
                "not configured" if client.scope is None else f"using ticket {load_request.ticket}"
            )
            message = f"the engine asked the store for {load_request.name!r} while {found}"
            kind = FailureKind.INTERNAL
            self._effects.send(number, msg.Failed(load_request.ticket, kind, message, []))
            return
        try:
            Blend.read(load_request.path)
        except BlendError as error:
            failure = Failure(FailureKind.INVALID, str(error), [])
            self.loads.answer_failed(ticket, failure)
            return
        binding = Binding(client.server, client.scope, load_request.adapter)
        tenant = Owner(client.server, load_request.owners[0]) if load_request.owners else None
        if tenant is not None:
            self.memory.limit(client.scope, tenant, load_request.most)
        if not fresh:
            pack = self.memory.of_adapter(binding, load_request.path)
            if pack is not None:
                self.loads.answer_loaded(ticket, pack.info, now, was_read=False)
                self.memory.own(pack, tenant)
                return
            known = self.loads.failures.find(binding, load_request.path, now)
            if known is not None:
                self.loads.answer_failed(ticket, known)
                return
        owners = [Owner(client.server, of) for of in load_request.owners or (load_request.adapter,)]
        load = self.loads.of_adapter(binding, load_request.path)
        if load is None:
            load = self.loads.add(binding, load_request.path, owners, client, [ticket])
        elif fresh and load.has_begun:
            load.later.append(ticket)
        else:
            load.tickets.append(ticket)
            if load.has_begun:
                self._effects.send(number, msg.Reading(ticket.number))
            elif load_request.keep:
                self.loads.queue.promote(load.number)
        self.loads.share(load, owners)
        if load.tenant is None:
            load.tenant = tenant
        client.loads[load_request.ticket] = load

    def share(self, number: int, ticket: int, owner: str) -> None:
        """Another owner waits for what a client's want has asked for."""
        client = self.clients[number]
        load = client.loads.get(ticket)
        if load is not None:
            self.loads.share(load, (Owner(client.server, owner),))

    def cancel(self, number: int, ticket: int, now: float) -> None:
        load = self.clients[number].loads.pop(ticket, None)
        if load is None:
            return
        load.take_back(lambda one: (one.client, one.number) == (number, ticket))
        self.loads.end_if_unwanted(load, now)
        self._unbind_unused()

    def release(self, number: int, pack: int, now: float) -> None:
        """A client gives one lease back; one that it does not have is no matter."""
        leases = self.clients[number].leases
        if leases[pack] > 0:
            leases[pack] -= 1
            self.memory.release(pack)
        if leases[pack] == 0:
            del leases[pack]
        self._unbind_unused()
        self.loads.give_room(now)

    def used(self, number: int, packs: Iterable[int]) -> None:
        client = self.clients[number]
        now_used = frozenset(packs)
        self.memory.used(now_used, now_used - client.last_used)
        client.last_used = now_used

    def forget(self, number: int, adapter: int, now: float) -> None:
        """A client's server has withdrawn an adapter.

        Each engine of a server says so when its own requests have ended. Until the last one has,
        the adapter is the others' still, as long as they want it or have leases on it.
        """
        server = self.clients[number].server
        self.loads.withdraw(number, adapter, now)
        self._leaving.setdefault((server, adapter), set()).add(number)
        self._unbind_unused()
        self.loads.failures.forget(server, adapter)
        self._effects.send(number, msg.Forgotten(adapter))

    def _evicted(self, pack: Pack) -> None:
        # Whatever was bound to it is not told apart: it may not be bound any more.
        for client in self.clients.values():
            if client.scope == pack.scope:
                self._effects.send(client.number, msg.Evicted(pack.info.pack))

    def _unbind_unused(self) -> None:
        """Adapters that were forgotten are nobody's once nobody else uses them."""
        for (server, adapter), forgotten in list(self._leaving.items()):
            bound = self.memory.bound(server, adapter)
            packs = {pack.info.pack for pack in bound.values()}
            if not any(
                # It wants the adapter, or has a lease on one of its packs.
                any(load.binding.adapter == adapter for load in client.loads.values())
                or not packs.isdisjoint(client.leases)
                for client in self.clients.values()
                if client.server == server and client.number not in forgotten
            ):
                del self._leaving[server, adapter]
                for binding in bound:
                    self.memory.unbind(binding)

    def _apply_settings(self, now: float) -> None:
        """Each client's budget is enough, and places are the most that any asks for."""
        asked = [c.settings for c in self.clients.values() if c.settings is not None]
        if asked:
            self.memory.allow({CpuBudget(one.budget_adapters, one.budget_bytes) for one in asked})
            self.loads.queue.places = max(1, *(one.jobs for one in asked))
        self.loads.give_room(now)
