"""What the store's registry keeps: clients, loads, packs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from vllm_multilora.store.memory.arena import Allocation
from vllm_multilora.store.protocol.messages import Contents, PackInfo, StoreSettings


@dataclass(frozen=True)
class Scope:
    """What an adapter must have been checked against and packed for to be the same to somebody.

    `model` is the signature of the layouts; the others are settings.
    """

    model: str
    allowed_roots: tuple[str, ...]
    directories: tuple[str, ...]
    allow_pickle: bool
    check_finite: bool
    signing_keys: str | None


@dataclass(frozen=True)
class Binding:
    """What an adapter number means: in one server, for one model, under its rules."""

    server: str
    scope: Scope
    adapter: int


class Owner(NamedTuple):
    """The owner of a load's turn in the queue and of a pack in memory.

    Servers do not know each other's tenants: equal names are different owners there. Engines of
    one server have the same ones.

    Attributes:
        server: As of `Hello`.
        of: The name of a tenant; or an adapter's number, for loads that no tenant waits for.
    """

    server: str
    of: str | int


@dataclass
class Client:
    """A connection that has said `Hello`; `loads` are those that its tickets wait for."""

    number: int
    role: str
    server: str
    pid: int
    scope: Scope | None = None
    layouts: Any = None
    settings: StoreSettings | None = None
    loads: dict[int, Load] = field(default_factory=dict)
    leases: Counter[int] = field(default_factory=Counter)
    last_used: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Ticket:
    """One want of one client."""

    client: int
    number: int
    keep: bool
    arrived: float


@dataclass(eq=False)
class Load:
    """One adapter on its way: queued, or being read by a job of its own, or following another.

    Attributes:
        owners: Whose turn it may take.
        settings: Of the client that wanted it first.
        later: Wants of freshly read files that came when these may have been opened already.
        version: Of the files; empty if they have none.
        followers: Loads of the same folder's files, which wait for this one's end.
        leader: The load that this one follows.
        contents: What the files' check has found; None before; so the next.
        blocks: int64 [n], bytes of the blocks.
        allocation: Where the job packs to; None: it only checks.
        tenant: The first that wants it; None: none does.
        is_anew: Whether memory was used up when it was packed before.
    """

    number: int
    binding: Binding
    path: str
    owners: list[Owner]
    layouts: Any
    settings: StoreSettings
    tickets: list[Ticket] = field(default_factory=list)
    later: list[Ticket] = field(default_factory=list)
    job: bool = False
    version: str = ""
    followers: list[Load] = field(default_factory=list)
    leader: Load | None = None
    contents: Contents | None = None
    blocks: NDArray[np.int64] | None = None
    allocation: Allocation | None = None
    tenant: Owner | None = None
    is_anew: bool = False

    @property
    def has_begun(self) -> bool:
        """Whether its files are being read, or may be: also where another load reads them."""
        return self.job or self.leader is not None

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits for it, and not just for those that follow it."""
        return bool(self.tickets or self.later)

    def take_back(self, is_gone: Callable[[Ticket], bool]) -> list[Ticket]:
        """Nobody waits for these tickets any more; returns them."""
        gone = [ticket for ticket in (*self.tickets, *self.later) if is_gone(ticket)]
        self.tickets = [ticket for ticket in self.tickets if ticket not in gone]
        self.later = [ticket for ticket in self.later if ticket not in gone]
        if not self.is_awaited:
            self.tenant = None
        return gone

    def family(self) -> list[Load]:
        return [self, *self.followers]

    def may_follow(self, leader: Load) -> bool:
        """Whether another load may end this one: what it reads, and says of it, is the same."""
        return (
            leader is not self
            and leader.job
            and bool(self.version)
            and leader.version == self.version
            and leader.binding.scope == self.binding.scope
            and leader.path == self.path  # which messages name
            and leader.settings.timeout_s >= self.settings.timeout_s
        )

    def whose(self) -> Owner | None:
        """The tenant that is to have the pack; None: nobody in particular."""
        return next((load.tenant for load in self.family() if load.tenant is not None), None)

    def keep(self) -> bool:
        """Whether somebody wants it in memory."""
        return any(ticket.keep for load in self.family() for ticket in load.tickets)

    def requested(self) -> bool:
        return any(load.is_awaited for load in self.family())

    def info(self, digest: str, nbytes: int, parts: tuple[str, ...]) -> PackInfo:
        """What it has read, as a pack without a number."""
        allocation = self.allocation
        assert self.contents is not None
        assert self.blocks is not None
        return PackInfo(
            **msgspec.structs.asdict(self.contents),
            pack=0,
            nbytes=nbytes,
            digest=digest,
            segments=list(allocation.segments) if allocation else [],
            index_place=int(allocation.places[-1]) if allocation else 0,
            index_bytes=int(self.blocks[-1]),
            parts=parts,
        )


@dataclass(eq=False)
class Pack:
    """An adapter in memory.

    Attributes:
        versions: The files that it is known to be equal to, in the order of their last reading.
        bindings: The adapters that it is, with their folders.
        tenant: The first that has wanted it, of a server that still has it; None: nobody in
            particular.
    """

    info: PackInfo
    scope: Scope
    allocation: Allocation
    versions: dict[str, None] = field(default_factory=dict)
    bindings: dict[Binding, str] = field(default_factory=dict)
    leases: int = 0
    tenant: Owner | None = None
