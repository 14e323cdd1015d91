"""Recent failures, which answer further wants for a while; bounded in number."""

from __future__ import annotations

from collections import OrderedDict

from vllm_multilora.store.entries import Binding
from vllm_multilora.store.job_messages import Failure

MOST_FAILURES = 1024

RETRY_AFTER_S = 2.0
"""Seconds for which a failure is the answer to further wants."""


class RecentFailures:
    """The last failure of each adapter, until its time is over."""

    def __init__(self) -> None:
        self._failures: OrderedDict[Binding, tuple[str, float, Failure]] = OrderedDict()

    def remember(self, binding: Binding, path: str, failure: Failure, now: float) -> None:
        self._failures.pop(binding, None)
        self._failures[binding] = path, now + RETRY_AFTER_S, failure
        if len(self._failures) > MOST_FAILURES:
            self._failures.popitem(last=False)

    def find(self, binding: Binding, path: str, now: float) -> Failure | None:
        """The failure that answers a want of this adapter now."""
        known = self._failures.get(binding)
        if known is None:
            return None
        failed_path, until, failure = known
        return failure if failed_path == path and now < until else None

    def forget(self, server: str, adapter: int | None = None) -> None:
        """Nothing is known of a server's adapter any more; None: of any of them."""
        for binding in list(self._failures):
            if binding.server == server and adapter in (None, binding.adapter):
                del self._failures[binding]
