"""What an engine core says only while its workers compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Asides:
    """What an engine core has to say to the store, and to those who wait for its answers.

    Whoever hears something goes to work. Where processors are few, that would take them from the
    engine core, and the workers would wait for their next step; said once they have it, it costs
    no request anything. For one thread.

    Attributes:
        wait: Whether what is said waits for `flush`: where the workers are other processes that
            compute a step as soon as it was sent.
    """

    def __init__(self) -> None:
        self.wait = False
        self._calls: deque[Callable[[], None]] = deque()

    def say(self, call: Callable[[], None]) -> None:
        """Calls something, now or in the next `flush`; in the order in which it was said."""
        if self.wait:
            self._calls.append(call)
        else:
            call()

    def flush(self) -> None:
        """Says everything: the workers compute, or an answer is waited for, or nobody waits."""
        while self._calls:
            self._calls.popleft()()
