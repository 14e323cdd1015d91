"""Limits uvicorn's log lines for requests without a valid key."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from http import HTTPStatus

from vllm_multilora.wording import counted

logger = logging.getLogger(__name__)

MOST_LINES = 10
"""Lines for requests without a valid key in each period."""

PERIOD_S = 10.0


class FewRefusals(logging.Filter):
    """Lets few of the lines through that say 401; whoever has no key could fill the disk.

    How many were left out is said before the first line of the next period.

    Args:
        clock: Seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._begun = -PERIOD_S
        self._lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line of uvicorn's is logged."""
        # The client's address, method, path and version, and the status.
        if not (isinstance(record.args, tuple) and record.args[-1:] == (HTTPStatus.UNAUTHORIZED,)):
            return True
        now = self._clock()
        if now - self._begun >= PERIOD_S:
            left_out = self._lines - MOST_LINES
            self._begun, self._lines = now, 0
            if left_out > 0:
                logger.warning(
                    "%s without a valid key came in the time before.",
                    counted(left_out, "more request"),
                )
        self._lines += 1
        return self._lines <= MOST_LINES


class NoGoneClients(logging.Filter):
    """Leaves out the tracebacks of answers to clients that have gone.

    Uvicorn does not notice that they have where more of their requests were in line. Who has no key
    waits for answers, and need not: each connection could be a traceback in the log.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether something is logged that uvicorn has to say."""
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, RuntimeError) and _CLOSED in str(error))


_CLOSED = "the handler is closed"  # as uvloop says it of a connection


def keep_refusals_few() -> None:
    """From now on uvicorn logs few refusals; saying it again is no matter."""
    for name, kind in (("uvicorn.access", FewRefusals), ("uvicorn.error", NoGoneClients)):
        logger = logging.getLogger(name)
        if not any(isinstance(known, kind) for known in logger.filters):
            logger.addFilter(kind())
