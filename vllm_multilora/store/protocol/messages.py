"""What the store and its clients say to each other.

Messages are msgpack arrays, tagged with the name of their type. A client sends `Hello` first and,
if it is an engine, `Configure`; the store answers `Configured` or `Refused`. After that, either
side sends whenever it has something to say. `PROTOCOL` is raised with every change that an older
side would misread. It is part of the socket's name, so that servers of different versions on one
machine use different stores.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.wording import adapter_kind

PROTOCOL = 11

Role: TypeAlias = Literal["engine", "worker", "server", "observer"]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base class of all messages, those between the store and its jobs too."""


class StoreSettings(msgspec.Struct, frozen=True, array_like=True):
    """How an engine wants its adapters to be kept and read.

    What is in a store with several engines is within one of their budgets, and its `jobs` are the
    most that any of them asks for. The policy is that of the engine that came first.

    Attributes:
        budget_bytes: Host memory for adapters, those being read included. None: no limit.
        budget_adapters: Adapters in host memory, those being read included. None: no limit.
        policy: Name of the cache policy, or `module:Class`.
        jobs: Adapters read at once; those that take long do not count.
        timeout_s: Seconds that checking and reading one adapter may take, without waiting.
        allowed_roots: Folders that adapters' files must lie below, and URLs of sources that they
            may be fetched from. Empty: any folder, and no source.
        directories: Directories of adapters: roots too, and where there are no others, what lies in
            one must not lead out of them by a link.
        allow_hub: Whether the Hugging Face hub is asked for what is no folder.
        signing_keys: File of those by one of whom adapters must be signed. None: signatures are
            not looked at.
        disk_cache: Folder for what is fetched, within `disk_cache_bytes`. None: nothing is.
        source_credentials: File of variables for those that fetch.
    """

    budget_bytes: int | None = None
    budget_adapters: int | None = None
    policy: str = "lru"
    jobs: int = 2
    timeout_s: float = 120.0
    allowed_roots: tuple[str, ...] = ()
    directories: tuple[str, ...] = ()
    allow_pickle: bool = False
    allow_hub: bool = False
    check_finite: bool = True
    signing_keys: str | None = None
    disk_cache: str | None = None
    disk_cache_bytes: int = 0
    source_credentials: str | None = None


class Contents(msgspec.Struct, frozen=True, array_like=True):
    """What the check of an adapter's files has found in them.

    Attributes:
        has_special: Whether it has tensors for layers that vLLM fills itself.
        invocation_tokens: Token ids from whose last occurrence in a prompt on the adapter acts;
            none: it acts on all of it.
        dora: Whether it is a DoRA adapter, which multiplies outputs too.
    """

    rank: int
    has_special: bool
    invocation_tokens: tuple[int, ...]
    dora: bool


class PackInfo(Contents, frozen=True):
    """An adapter as it lies in host memory, packed for every rank of one model.

    Attributes:
        pack: Its number, never used twice, not even by a store that is started again.
            0: it was read and checked, and not kept in memory.
        nbytes: Bytes of its blocks.
        digest: BLAKE3 of its files, hexadecimal.
        segments: Numbers of the segments that it lies in; places refer to them by their index.
        index_place: Place of the block that says what lies where
        (`adapters/packing/pack_index.py`).
        index_bytes: Bytes of that block, padding included.
        parts: The digests of a blend's parts, in their order; none for other adapters.
    """

    pack: int
    nbytes: int
    digest: str
    segments: list[int]
    index_place: int
    index_bytes: int
    parts: tuple[str, ...]

    @property
    def kind(self) -> str:
        """What people call it; see `adapter_kind`."""
        return adapter_kind(
            invocation_tokens=self.invocation_tokens, dora=self.dora, parts=self.parts
        )


# From a client to the store.


class Hello(Message, frozen=True):
    """The first message of every client.

    Attributes:
        role: `engine`: wants adapters. `worker`: maps segments. `server`: shares names with the
            other API servers of its server. `observer`: looks only.
        server: Identity of the server that the client belongs to. Engines of one server share
            adapter numbers.
        pid: The client's process, for `Description`, and to know an API server that comes back.
        peers: How many API servers its server has, if this one was at a store before; 0: it was
            not.
    """

    protocol: int
    role: Role
    server: str
    pid: int
    peers: int = 0


class Configure(Message, frozen=True):
    """What an engine's model accepts, and how its adapters are kept.

    Attributes:
        layouts: `list[ModelLayout]` of all local ranks as msgpack with sorted keys; equal bytes
            mean equal models.
    """

    layouts: bytes
    settings: StoreSettings


class LoadRequest(Message, frozen=True):
    """Asks for an adapter; answered by `Loaded` or `Failed` with the same ticket.

    Attributes:
        adapter: The adapter's number, the same in all engines of a server.
        path: The adapter's folder, or what it is blended of (`adapters.blends.Blend.source`).
        owners: Whose turn a load may take (tenants); empty: the adapter is its own owner.
        most: How many adapters of the first owner stay in memory; for one more, one of these
            leaves. None: no limit.
        keep: Whether it is wanted in memory: `Loaded` then comes with a lease, and other adapters
            leave for it. Otherwise it is read and checked, and kept only where room is free.
        fresh: Whether its files are looked at again even if it is in memory.
        ticket: The client's number for this want, unique among its outstanding ones: the client
            gives it when it sends the load request.
    """

    adapter: int
    name: str
    path: str
    owners: tuple[str, ...] = ()
    most: int | None = None
    keep: bool = True
    fresh: bool = False
    ticket: int = 0


class Share(Message, frozen=True):
    """Another owner waits for what was requested: its load may take that one's turn too."""

    ticket: int
    owner: str


class Cancel(Message, frozen=True):
    """Takes a load request back; an answer may be on its way already, with a lease."""

    ticket: int


class Release(Message, frozen=True):
    """Gives one lease back; each `Loaded` of a load request with `keep` gave one."""

    pack: int


class Used(Message, frozen=True):
    """A step uses these packs: what the cache policy learns from."""

    packs: list[int]


class Forget(Message, frozen=True):
    """The server has withdrawn an adapter; answered by `Forgotten`.

    The client's outstanding wants of it fail, and its pack leaves memory when no lease, no other
    adapter and no other engine of the server holds it.
    """

    adapter: int


class Map(Message, frozen=True):
    """Asks for a segment's descriptor; answered by `Segment`."""

    segment: int


class Watch(Message, frozen=True):
    """The client registers segments with a device; it says so before its first `Map`.

    It is told of all segments, those that are there first, by `SegmentOpened`: registering takes
    long, and is to be over when a pack in one is to be copied. The descriptors that it gets can be
    written to. Pages of a segment that it has mapped are never given back singly: the device would
    go on reading the old ones.
    """


class Publish(Message, frozen=True):
    """A name leads to an adapter from now on, in all API servers; answered by `Settled`.

    Attributes:
        adapter: The adapter's number. Once it is replaced or retracted, no name leads to it again.
        details: What else API servers keep with a name.
        again: Whether the name led there at a store that has died: another adapter that it leads
            to by now is newer.
    """

    request: int
    name: str
    adapter: int
    path: str
    details: dict[str, str | bool]
    again: bool = False


class Retract(Message, frozen=True):
    """A name does not lead to an adapter any more, in all API servers; answered by `Settled`.

    Another adapter that it leads to by now stays. Fields as of `Publish`.
    """

    request: int
    name: str
    adapter: int


class Saw(Message, frozen=True):
    """The client has taken in what came with this serial number."""

    serial: int


class Describe(Message, frozen=True):
    """Asks for a `Description`."""


# From the store to a client.


class Configured(Message, frozen=True):
    """The engine may want adapters now; `notes` say what is not as it has asked for."""

    notes: list[str]


class Refused(Message, frozen=True):
    """The store will not serve this client, for a reason, and closes the connection."""

    reason: str


class Reading(Message, frozen=True):
    """The adapter of a load request has got its turn and is being read."""

    ticket: int


class Loaded(Message, frozen=True):
    """A want is fulfilled.

    Attributes:
        seconds: From the load request's arrival to now.
        was_read: Whether the files' bytes were read for it, rather than found in memory.
        leased: Whether the client has a lease on the pack for it: the load request had `keep`.
    """

    ticket: int
    pack: PackInfo
    seconds: float
    was_read: bool
    leased: bool


class Failed(Message, frozen=True):
    """A want cannot be fulfilled; the rest as of `job_messages.Failure`."""

    ticket: int
    kind: FailureKind
    message: str
    problems: list[dict[str, Any]]


class Evicted(Message, frozen=True):
    """A pack of the client's model has left memory; the client need not know it."""

    pack: int


class Forgotten(Message, frozen=True):
    """The answer to `Forget`: nothing that comes later is about that use of the number."""

    adapter: int


class Totals(Message, frozen=True):
    """What host memory holds, when it has changed, packs that are being read included.

    The limits are the largest budgets. None: that of some engine is without this limit.
    """

    bytes: int
    adapters: int
    bytes_limit: int | None
    adapters_limit: int | None


class Segment(Message, frozen=True):
    """The answer to `Map`, with the segment's descriptor; size 0 and none: no such segment."""

    number: int
    size: int


class SegmentOpened(Message, frozen=True):
    """There is a segment of this number."""

    number: int


class SegmentClosed(Message, frozen=True):
    """Nothing lies in a segment that the client has mapped, and nothing will; to be unmapped."""

    number: int


class Published(Message, frozen=True):
    """A name was published, by whatever API server; fields as of `Publish`.

    To be answered by `Saw`, unless the serial number of the change is 0: it is an earlier one, and
    nobody waits for it.
    """

    serial: int
    name: str
    adapter: int
    path: str
    details: dict[str, str | bool]


class Retracted(Message, frozen=True):
    """A name was retracted; to be answered like `Published`."""

    serial: int
    name: str
    adapter: int


class Settled(Message, frozen=True):
    """All API servers have seen what the client has published or retracted, or do not answer."""

    request: int


class ClientRow(msgspec.Struct, frozen=True, array_like=True):
    """One client of the store, for people."""

    role: str
    server: str
    pid: int
    load_requests: int
    leases: int


class Description(Message, frozen=True):
    """How the store is doing, for `status` and `doctor`.

    Attributes:
        mode: `process` or `thread`.
        protection: What keeps checks of hostile files in bounds, one phrase each.
        segment_bytes: Bytes of all segments, free pages included.
        stuck: Killed checks that have not ended, because their storage hangs.
    """

    pid: int
    mode: str
    protection: list[str]
    clients: list[ClientRow]
    totals: Totals
    segment_bytes: int
    queued: int
    reading: int
    stuck: int


class Restarted(Message, frozen=True):
    """Made by the client itself: the store is a new one; all packs and leases are gone.

    Wants that were outstanding have been sent again, with their tickets.
    """


FromClient: TypeAlias = (
    Hello
    | Configure
    | LoadRequest
    | Share
    | Cancel
    | Release
    | Used
    | Forget
    | Map
    | Watch
    | Publish
    | Retract
    | Saw
    | Describe
)
FromStore: TypeAlias = (
    Configured
    | Refused
    | Reading
    | Loaded
    | Failed
    | Evicted
    | Forgotten
    | Totals
    | Segment
    | SegmentOpened
    | SegmentClosed
    | Published
    | Retracted
    | Settled
    | Description
)
ToUser: TypeAlias = (
    Reading | Loaded | Failed | Evicted | Forgotten | Totals | Description | Restarted
)
"""What `StoreClient.poll` returns."""
