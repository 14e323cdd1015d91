"""The store's event loop: clients and jobs on one thread."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import secrets
import selectors
import socket
import time
from typing import Any

from vllm_multilora.failures import classify_failure
from vllm_multilora.slots.policies.policy_registry import make_policy
from vllm_multilora.store.connections import Acceptor, Connection, Conversation, RefusedError
from vllm_multilora.store.jobs.adapter_reader import AdapterReader
from vllm_multilora.store.jobs.job_pool import JobPool
from vllm_multilora.store.jobs.runner import Runner
from vllm_multilora.store.memory.arena import Arena
from vllm_multilora.store.memory.entries import Load
from vllm_multilora.store.memory.held_packs import HostMemory
from vllm_multilora.store.memory.segments import SharedSegments
from vllm_multilora.store.protocol import messages as msg
from vllm_multilora.store.protocol.channel import ChannelClosedError
from vllm_multilora.store.protocol.job_messages import Failure, ToJob
from vllm_multilora.store.shared_registrations import PublishedNames
from vllm_multilora.store.sources.fetching import FetchingRegistry

logger = logging.getLogger(__name__)

LINGER_S = 2.0
"""Seconds without clients after which the store ends."""

_TOTALS_EVERY_S = 0.05
_AWAKE_S = 1.0
"""Seconds that the loop sleeps at most while jobs work: if it is much longer, it stood still."""


class StoreServer:
    """A store; `run` returns when it has nobody left to serve, unless it is to `keep` on."""

    def __init__(
        self, listener: socket.socket, runner: Runner, reader: AdapterReader, *, keep: bool = False
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._acceptor = Acceptor(listener)
        self._runner = runner
        self._keep = keep
        self._segments = SharedSegments()
        # Numbers go on where no other store's are likely to be: old ones must mean nothing here.
        arena = Arena(self._segments, None, first_segment=secrets.randbits(31) + 1)
        numbers = itertools.count((secrets.randbits(31) + 1) << 20)
        memory = HostMemory(arena, make_policy("lru"), numbers, keeps=keep)
        self._registry = FetchingRegistry(memory, self, self._selector)
        self._job_pool = JobPool(runner, reader, self._selector)
        self.kill, self.refusal = self._job_pool.kill, self._job_pool.refusal
        self._names = PublishedNames(self)
        self._conversation = Conversation(self._registry, self._segments, reader, self._names)
        self._connections: dict[int, Connection] = {}
        self._numbers = itertools.count(-1, -1)  # jobs have positive numbers, clients negative ones
        self._lost: set[int] = set()
        self._unstarted: list[tuple[int, Failure]] = []
        self._alone_since = self._awake = time.monotonic()
        self._totals_sent = 0.0
        self._stopped = False
        self._bell, self._rope = socket.socketpair()
        self._selector.register(self._acceptor, selectors.EVENT_READ, self._accept)
        self._selector.register(self._bell, selectors.EVENT_READ, lambda: None)

    def stop(self) -> None:
        """Makes `run` return soon; for signal handlers and other threads."""
        self._stopped = True
        self._rope.close()  # which the other end hears

    def run(self) -> None:
        """Serves until the last client has gone, or `stop`."""
        try:
            while not self._stopped and not self._is_over():
                for key, _ in self._selector.select(self._patience()):
                    self._react(key.data)
                self._settle()
        finally:
            self._close()

    # What the registry asks for

    def send(self, client: int, message: msg.Message) -> None:
        message = self._registry.answered(client, message)
        connection = self._connections.get(client)
        if connection is not None and client not in self._lost:
            try:
                connection.channel.send(message)
            except ChannelClosedError as error:
                self._lose(client, error)

    def start(self, load: Load) -> None:
        try:
            self._job_pool.start(load)
        except OSError as error:
            self._unstarted.append((load.number, _system_failure("start a check", error)))

    def tell(self, job: int, message: ToJob, segments: tuple[int, ...]) -> None:
        try:
            self._job_pool.tell(job, message, [self._segments.descriptor(n) for n in segments])
        except OSError as error:
            self._unstarted.append((job, _system_failure("hand memory to a check", error)))

    # The loop

    def _react(self, data: Any) -> None:
        if callable(data):
            data()
        elif data < 0:
            self._hear_client(data)
        else:
            self._job_pool.hear(data, self._registry.loads)

    def _settle(self) -> None:
        """What is due after each round: ends, starts, news, and what could not be sent at once."""
        self._job_pool.look(self._registry.loads)
        self._tick()
        self._names.tick(time.monotonic())
        while self._lost or self._unstarted:
            if self._lost:
                self._drop(self._lost.pop())
            else:
                number, failure = self._unstarted.pop()
                self._registry.loads.gone(number, failure, time.monotonic())
            self._tick()  # there may be a place again
        self._tell_segments()
        self._tell_totals()
        for connection in self._connections.values():
            connection.channel.wait_in(self._selector)

    def _tick(self) -> None:
        """Ends and starts jobs; the time that the loop stood still, wherever, was not theirs."""
        before, self._awake = self._awake, time.monotonic()
        if (seconds := self._awake - before) > 2 * _AWAKE_S:
            self._registry.loads.queue.stood_still(seconds)
        self._registry.loads.tick(self._awake)

    def _patience(self) -> float | None:
        """Seconds that the loop may sleep."""
        if self._lost:
            return 0.0
        now = time.monotonic()
        times = [
            now + _AWAKE_S if self._job_pool.reading else None,
            self._registry.loads.queue.next_event(now),
            self._job_pool.next_look(),
            self._names.next_event(),
        ]
        if self._lack(self._registry.memory.totals()):
            times.append(self._totals_sent + _TOTALS_EVERY_S)
        if not self._connections and not self._keep:
            times.append(self._alone_since + LINGER_S)
        due = min((one for one in times if one is not None), default=None)
        return None if due is None else max(0.0, due - now)

    def _is_over(self) -> bool:
        if self._keep or self._connections:
            return False
        return time.monotonic() - self._alone_since >= LINGER_S

    def _accept(self) -> None:
        channel = self._acceptor.accept()
        if channel is None:
            return
        number = next(self._numbers)
        self._connections[number] = Connection(number, channel)
        self._selector.register(channel, selectors.EVENT_READ, number)

    def _hear_client(self, number: int) -> None:
        connection = self._connections[number]
        try:
            connection.channel.flush()
            for message, _ in connection.channel.receive():
                if self._conversation.hear(connection, message):
                    connection.channel.send(self._describe())
        except RefusedError as error:
            self._refuse(number, str(error))
        except ChannelClosedError as error:
            self._lose(number, error)
        except OSError as error:  # no descriptor for a segment, say
            self._refuse(number, f"the store failed: {error}")

    def _refuse(self, number: int, reason: str) -> None:
        """Gives a client up; it gets the reason if it has read what was sent before."""
        self.send(number, msg.Refused(reason))
        self._lost.add(number)

    def _lose(self, number: int, error: ChannelClosedError) -> None:
        logger.info("Client %d: %s", -number, error)
        self._lost.add(number)

    def _drop(self, number: int) -> None:
        connection = self._connections.pop(number)
        self._selector.unregister(connection.channel)
        connection.channel.close()
        self._names.leave(number)
        if number in self._registry.clients:
            self._registry.client_gone(number, time.monotonic())
        self._alone_since = time.monotonic()

    def _tell_segments(self) -> None:
        numbers = self._segments.numbers
        for number, connection in self._connections.items():
            for segment in connection.segments - numbers:
                self.send(number, msg.SegmentClosed(segment))
            connection.segments &= numbers
            if connection.watches:
                for segment in numbers - connection.segments:
                    self.send(number, msg.SegmentOpened(segment))
                connection.segments |= numbers

    def _tell_totals(self) -> None:
        totals, now = self._registry.memory.totals(), time.monotonic()
        if now - self._totals_sent >= _TOTALS_EVERY_S:
            for connection in self._lack(totals):
                connection.totals, self._totals_sent = totals, now
                self.send(connection.number, totals)

    def _lack(self, totals: msg.Totals) -> list[Connection]:
        """Connections without the newest totals, if they have read their earlier messages."""
        return [
            self._connections[client.number]
            for client in self._registry.clients.values()
            if client.role in ("engine", "observer")
            and (connection := self._connections[client.number]).totals != totals
            and not connection.channel.pending
        ]

    def _describe(self) -> msg.Description:
        clients = [
            msg.ClientRow(one.role, one.server, one.pid, len(one.loads), sum(one.leases.values()))
            for one in self._registry.clients.values()
        ]
        memory = self._registry.memory
        return msg.Description(
            pid=os.getpid(),
            mode=self._runner.mode,
            protection=self._runner.protection(),
            clients=clients,
            totals=memory.totals(),
            segment_bytes=memory.arena.committed,
            queued=self._registry.loads.queue.queued,
            reading=self._job_pool.reading,
            stuck=self._job_pool.stuck,
        )

    def _close(self) -> None:
        self._acceptor.close()  # first: clients that are told look for the next store at once
        self._registry.close()
        self._job_pool.kill_all()
        for connection in self._connections.values():
            connection.channel.close()
        self._bell.close()
        self._rope.close()
        self._selector.close()
        self._segments.close_all()


def _system_failure(what: str, error: OSError) -> Failure:
    message = f"the store cannot {what}: {error}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        message += "; raise its limit of open files (ulimit -n)"
    return Failure(classify_failure(error), message, [])  # a later try may succeed
