"""How an engine core talks to the store."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal

import msgspec

from vllm_multilora.failures import FailureKind
from vllm_multilora.sources.hub import located
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.channel import Channel, ChannelClosedError
from vllm_multilora.store.protocol.messages import PROTOCOL
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError
from vllm_multilora.store.protocol.waking import Waker
from vllm_multilora.store.store_launch import FIRST_PAUSE_S, LONGEST_PAUSE_S, StoreHost, store_host

logger = logging.getLogger(__name__)

_NUMBERS_END = 1 << 63  # steps' adapters are in arrays of int64
_CONFIGURE_S, _MAX_LOSSES = 60.0, 3  # before `configure` gives a store up
_NO_STORE = "the server's store of adapters cannot be started; the server's log says why"


class StoreClient:
    """A connection to the store, for one thread.

    Nothing but `configure` waits for the store, and `poll` where it is told to. One that has died
    is started again by `poll`, which then returns `Restarted`: packs and leases are gone, wants go
    on, but fail where no store has come up for seconds. A frozen one just does not answer.

    Raises:
        StoreUnavailableError: There is no store, and none can be started.
    """

    def __init__(self, host: StoreHost, server: str, role: msg.Role = "engine") -> None:
        self._host = host
        self._hello = msg.Hello(PROTOCOL, role, server, os.getpid())
        self._configure: msg.Configure | None = None
        # Until their answers are taken; None: the store cannot be told of it.
        self._load_requests: dict[int, msg.LoadRequest | None] = {}
        self._tickets = itertools.count(1)
        self._inbox: deque[msg.ToUser] = deque()
        self._answer: msg.Configured | msg.Refused | None = None
        self._waker: Waker | None = None
        self._say: Callable[[Callable[[], None]], None] = operator.call
        self._say_all: Callable[[], None] = lambda: None
        self._pause = FIRST_PAUSE_S
        self._next_attempt = 0.0
        self._losses = 0
        self._channel: Channel[msg.FromStore] | None = None
        self._connect()

    @classmethod
    def connect(
        cls, mode: Literal["process", "thread"], server: str, role: msg.Role = "engine"
    ) -> StoreClient:
        """Finds or starts the store, in a process of its own or on a thread of this one."""
        return cls(store_host(mode), server, role)

    @property
    def address(self) -> str:
        """Where workers connect to, such as `unix:/run/user/1000/vllm-multilora/store-N.sock`."""
        return f"unix:{self._host.path}"

    def configure(self, layouts: Sequence[Any], settings: msg.StoreSettings) -> list[str]:
        """Says what the model accepts; returns what is not as asked for, one sentence each.

        Raises:
            StoreUnavailableError: The store refuses, or does not answer.
        """
        data = msgspec.msgpack.encode(list(layouts), order="deterministic")
        self._configure = msg.Configure(data, settings)
        self._answer = None
        self._send(self._configure)
        deadline = time.monotonic() + _CONFIGURE_S
        self._losses = 0
        while self._answer is None and self._losses < _MAX_LOSSES:
            if (left := deadline - time.monotonic()) <= 0:
                break
            self._pump(left)
        if isinstance(self._answer, msg.Configured):
            return self._answer.notes
        if self._answer is not None:
            reason = self._answer.reason
        elif self._losses < _MAX_LOSSES:
            reason = f"no answer within {_CONFIGURE_S:g} seconds"
        else:
            reason = f"it has ended {self._losses} times; it says: {self._host.last_words()}"
        raise StoreUnavailableError(f"the store at {self.address} does not serve: {reason}")

    def request_load(self, load_request: msg.LoadRequest) -> int:
        """Asks for an adapter; a relative path is one of this process's.

        Returns:
            The ticket: `Reading` may come for it, then `Loaded` or `Failed`, the latter also where
            the store cannot be told what is wanted.
        """
        ticket = next(self._tickets)
        try:
            if not 0 <= load_request.adapter < _NUMBERS_END:
                found = load_request.adapter
                raise ValueError(f"its number is {found}, expected one below 2^63")
            path = located(load_request.path)
            sent = msgspec.structs.replace(load_request, path=path, ticket=ticket)
            msgspec.msgpack.encode(sent)  # a request may name what no message can hold
        except (TypeError, ValueError) as error:
            adapter = f"adapter {load_request.name!a}"
            message = f"{adapter} cannot be asked for from {load_request.path!a}: {error}"
            self._load_requests[ticket] = None
            self._inbox.append(msg.Failed(ticket, FailureKind.INVALID, message, []))
            return ticket
        self._load_requests[ticket] = sent
        self._send(sent)
        return ticket

    def share(self, ticket: int, owner: str) -> None:
        """Says that another owner waits for what was requested; arguments as of `Share`."""
        load_request = self._load_requests.get(ticket)
        if load_request is not None and owner not in load_request.owners:
            owners = (*load_request.owners, owner)
            self._load_requests[ticket] = msgspec.structs.replace(load_request, owners=owners)
            self._send(msg.Share(ticket, owner))

    def cancel(self, ticket: int) -> None:
        """Takes a load request back: nothing comes for its ticket any more, and no lease stays."""
        if self._load_requests.pop(ticket, None) is not None:
            self._send(msg.Cancel(ticket))

    def release(self, pack: int) -> None:
        self._send(msg.Release(pack))

    def used(self, packs: Collection[int]) -> None:
        self._send(msg.Used(list(packs)))

    def forget(self, adapter: int) -> None:
        """Withdraws an adapter; this client's outstanding wants of it fail.

        `Forgotten` comes for it; or `Restarted`, if the store ends before that.
        """
        if self._channel is None:  # the next store will have nothing to forget
            self._inbox.append(msg.Forgotten(adapter))
        self._send(msg.Forget(adapter))

    def describe(self) -> None:
        self._send(msg.Describe())

    def poll(self, seconds: float = 0.0) -> list[msg.ToUser]:
        """What has come since the last call; waits at most so long for something to come."""
        if seconds:
            self._say_all()  # there is no answer to what was not said
        deadline = time.monotonic() + seconds
        self._pump(0)
        while not self._inbox and (left := deadline - time.monotonic()) > 0:
            self._pump(left)
        return self._taken()

    def fileno(self) -> int:
        """The socket, for selectors; -1 while there is no store. Another one after `Restarted`."""
        return -1 if self._channel is None else self._channel.fileno()

    def start_waking(self, wake: Callable[[], None]) -> None:
        """Calls `wake` on a thread of its own when something comes, once until the next `poll`."""
        self._waker = Waker(wake)
        self._waker.watch(self.fileno())

    def say_by(
        self, say: Callable[[Callable[[], None]], None], say_all: Callable[[], None]
    ) -> None:
        """From now on `say` is given what sends a message, to be called in the same order.

        At the latest by `say_all`, which is called before an answer is waited for.
        """
        self._say, self._say_all = say, say_all

    def close(self) -> None:
        """Ends the connection: leases and wants end with it."""
        if self._waker is not None:
            self._waker.close()
            self._waker = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _send(self, message: msg.Message) -> None:
        self._say(partial(self._send_on, self._channel, message))

    def _send_on(self, channel: Channel[msg.FromStore] | None, message: msg.Message) -> None:
        if channel is None or channel is not self._channel:
            return  # `_connect` sends again all that still matters to a new store
        try:
            channel.send(message)
        except ChannelClosedError as error:
            self._lose(error)

    def _pump(self, seconds: float) -> None:
        """Takes what is there, after waiting so long for it; brings a new store where it must."""
        if self._channel is None:
            self._reconnect()
            if self._channel is None:
                time.sleep(min(seconds, FIRST_PAUSE_S))
        elif self._channel.wait(seconds):
            try:
                self._channel.flush()
                for message, _ in self._channel.receive():
                    self._take(message)
            except ChannelClosedError as error:
                self._lose(error)
                self._reconnect()

    def _taken(self) -> list[msg.ToUser]:
        if self._waker is not None:
            self._waker.rearm()
        came: list[msg.ToUser] = []
        while self._inbox:
            message = self._inbox.popleft()
            if self._is_awaited(message):
                came.append(message)
        return came

    def _is_awaited(self, message: msg.ToUser) -> bool:
        """Whether it is for the user; an answer ends its request, or comes after its `cancel`."""
        if isinstance(message, msg.Reading):
            return message.ticket in self._load_requests
        if not isinstance(message, msg.Loaded | msg.Failed):
            return True
        if message.ticket in self._load_requests:
            del self._load_requests[message.ticket]
            return True
        if isinstance(message, msg.Loaded) and message.leased:
            self._send(msg.Release(message.pack.pack))
        return False

    def _take(self, message: msg.FromStore) -> None:
        if not isinstance(message, msg.Refused):  # it serves: its successor is worth a try at once
            self._pause, self._next_attempt = FIRST_PAUSE_S, 0.0
        match message:
            case msg.Configured(notes):
                if self._answer is not None:  # nobody waits for it: this is another store's
                    for note in notes:
                        logger.warning("Adapter store: %s", note)
                self._answer = message
            case msg.Refused(reason):
                self._answer = message
                logger.error("The store refuses to serve: %s", reason)
            case _ if isinstance(message, msg.ToUser):
                self._inbox.append(message)

    def _connect(self) -> None:
        sock = self._host.connect()
        sock.setblocking(False)
        channel: Channel[msg.FromStore] = Channel(sock, msg.FromStore)
        self._channel = channel
        if self._waker is not None:
            self._waker.watch(channel.fileno())
        for message in (self._hello, self._configure, *self._load_requests.values()):
            if message is not None:
                self._send_on(channel, message)

    def _reconnect(self) -> None:
        if time.monotonic() < self._next_attempt:
            return
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        try:
            self._connect()
        except StoreUnavailableError as error:
            logger.error("No store: %s; trying again in %.1f seconds", error, self._pause)
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        """Fails what is wanted where stores have not come up for long; others may be wanted."""
        if self._pause < LONGEST_PAUSE_S:
            return
        for ticket, load_request in self._load_requests.items():
            if load_request is not None:
                self._load_requests[ticket] = None
                kind = FailureKind.UNREADABLE
                self._inbox.append(msg.Failed(ticket, kind, _NO_STORE, []))

    def _lose(self, error: ChannelClosedError) -> None:
        """The store has gone: what it said is void, and the next one answers what is wanted."""
        assert self._channel is not None
        if (refusal := _refusal(self._channel)) is not None:
            self._take(refusal)
        says = f"; it says: {self._host.last_words()}" if self._pause > FIRST_PAUSE_S else ""
        logger.warning("The store has gone (%s); it is started again%s", error, says)
        self._channel.close()
        self._channel = None
        if self._waker is not None:
            self._waker.watch(-1)
        own = (
            m
            for m in self._inbox
            if isinstance(m, msg.Failed) and self._load_requests.get(m.ticket) is None
        )
        self._inbox = deque([*own, msg.Restarted()])
        self._losses += 1
        self._stop_waiting()


def _refusal(channel: Channel[msg.FromStore]) -> msg.Refused | None:
    """Why a store that has closed a connection does not serve, if it has said so before."""
    with contextlib.suppress(ChannelClosedError):
        while messages := channel.receive():
            for message, _ in messages:
                if isinstance(message, msg.Refused):
                    return message
    return None
