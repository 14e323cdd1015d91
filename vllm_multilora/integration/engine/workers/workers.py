"""How the engine core sends orders to its workers, which answer on a link of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_multilora.integration.worker import worker_calls
from vllm_multilora.integration.worker_link.fill_link import Answer, FillLink
from vllm_multilora.integration.worker_link.orders import Order
from vllm_multilora.store.protocol.messages import PackInfo

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
        """Has all workers begin with orders, after the steps that they have."""
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
        """What workers have answered since, each with its rank; waits at most so long."""
        return self._link.poll(seconds)
