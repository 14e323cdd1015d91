"""How the engine core reaches its workers and, if there is no other way, a store through them.

`LinkedWorkers` answer on a link of their own. Workers on other machines that cannot reach their
engine core have none: each of them asks a store of its own machine, and the engine waits.
`WaitingStore` and `WaitingWorkers` do the same for `--no-multilora-async-loading`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.integration.worker_link.fill_link import Answer, FillLink
from vllm_multilora.integration.worker_link.orders import Order
from vllm_multilora.store.protocol.messages import (
    Failed,
    Forgotten,
    Loaded,
    LoadRequest,
    PackInfo,
    ToUser,
)

Call = Callable[..., Any]
"""`collective_rpc` of vLLM's executor."""

# A worker's replies lie in a queue of 10 places (vLLM's `MessageQueue`), and calls in another one:
# with both full, neither side could go on. Replies are read in order, so that whoever reads a
# step's reply has read all before it: what can be unread is what was sent since the oldest step
# under way was, and the replies of the steps under way, two for each. This many leave room for a
# pipeline of eight stages.
_MAX_UNREAD = 4


class LinkedWorkers:
    """Workers that answer by themselves."""

    def __init__(
        self,
        call: Call,
        link: FillLink,
        elsewhere: Callable[[int], tuple[PackInfo, ...]] | None = None,
    ) -> None:
        self._call = call
        self._link = link
        self._elsewhere = elsewhere
        self._sent: deque[Any] = deque()

    def send(self, orders: list[Order]) -> None:
        if (elsewhere := self._elsewhere) is not None:
            orders = [replace(each, elsewhere=elsewhere(each.pack.pack)) for each in orders]
        self._sent.append(self._call(worker_calls.carry_out, args=(orders,), non_block=True))
        # Replies must be read sometime, or the workers cannot send any more. Steps read them in
        # passing; while there are none the workers are idle and answer at once. Only where more
        # was sent than that during the steps under way does this wait, for the oldest of these,
        # which the engine core would wait for next: the worst is that one step does not overlap.
        if len(self._sent) > _MAX_UNREAD:
            self._sent.popleft().result()

    def poll(self, seconds: float = 0.0) -> list[tuple[int, Answer]]:
        return self._link.poll(seconds)


class WaitingWorkers:
    """Workers that are waited for."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._answers: list[tuple[int, Answer]] = []

    def send(self, orders: list[Order]) -> None:
        for rank, answers in enumerate(self._call(worker_calls.carry_out_now, args=(orders,))):
            self._answers += ((rank, answer) for answer in answers)

    def poll(self, seconds: float = 0.0) -> list[tuple[int, Answer]]:
        answers, self._answers = self._answers, []
        return answers


class WaitingStore:
    """The stores that workers ask, as one that answers at once.

    Its packs are numbers that the workers know, each for what its own store gave it.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._tickets = itertools.count(1)
        self._inbox: list[ToUser] = []

    def request_load(self, load_request: LoadRequest) -> int:
        ticket = next(self._tickets)
        sent = msgspec.structs.replace(load_request, ticket=ticket)
        answers: list[Loaded | Failed] = self._call(worker_calls.load_now, args=(sent,))
        # Workers of one model agree on all that is looked at here; a failure of one is enough.
        failure = next((answer for answer in answers if isinstance(answer, Failed)), None)
        if failure is not None and load_request.keep:
            self.release(ticket)  # some may have it
        self._inbox.append(failure or answers[0])
        return ticket

    def share(self, ticket: int, owner: str) -> None:
        """Nobody's turn is waited for: everybody waits."""

    def cancel(self, ticket: int) -> None:
        for message in self._inbox:
            if isinstance(message, Loaded) and message.ticket == ticket and message.leased:
                self.release(message.pack.pack)
        self._inbox = [m for m in self._inbox if getattr(m, "ticket", None) != ticket]

    def release(self, pack: int) -> None:
        self._call(worker_calls.release_now, args=(pack,))

    def used(self, packs: Sequence[int]) -> None:
        """Workers' stores are told of nothing but loads."""

    def forget(self, adapter: int) -> None:
        self._call(worker_calls.forget_now, args=(adapter,))
        self._inbox.append(Forgotten(adapter))

    def poll(self, seconds: float = 0.0) -> list[ToUser]:
        inbox, self._inbox = self._inbox, []
        return inbox
