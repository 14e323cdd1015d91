"""Counts, in a server's process: where routes have led, who used which tokens, who was refused."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.label_values import BLENDS, OTHER, fit
from vllm_multilora.metrics.recorder import Recorder

if TYPE_CHECKING:
    from vllm_multilora.metering.usage_log import Usage

logger = logging.getLogger(__name__)

_RETRY_S = 60.0  # until a file that could not be made is tried again

_P = ParamSpec("_P")
_Count = Callable[Concatenate["ServerCounts", _P], None]
_CountIn = Callable[Concatenate["ServerCounts", Recorder, _P], None]


def _failing_no_request(count: _CountIn[_P]) -> _Count[_P]:
    """Gives `count` what records, if there is anything; logs what it raises.

    A request must not fail for being counted.
    """

    @functools.wraps(count)
    def count_or_log(counts: ServerCounts, /, *args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            if (recorder := counts.find()) is not None:
                count(counts, recorder, *args, **kwargs)
        except Exception:
            logger.exception("A request could not be counted: %s%r", count.__name__, args)

    return count_or_log


class ServerCounts:
    """The counts of one process; its file is made with the first. Without metrics, nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._make_recorder: Callable[[], Recorder | None] | None = None
        self._recorder: Recorder | None = None
        self._next_try = -math.inf

    def start(self, make_recorder: Callable[[], Recorder | None]) -> None:
        """From now on there is somewhere to count to; the newest engine's place counts.

        Args:
            make_recorder: Makes what records; returns None where metrics are off, or there is no
                room for the file, as while `/dev/shm` is full.
        """
        self._make_recorder, self._recorder, self._next_try = make_recorder, None, -math.inf

    @_failing_no_request
    def count_route(self, recorder: Recorder, route: str, lora_name: str, reason: str) -> None:
        """Counts a request that a route has led to an adapter."""
        recorder.names.admit(lora_name)  # the routes file names it
        led = fit(route), recorder.names.label(lora_name), reason
        # As many routes as the file has, and those that it had.
        if not recorder.routes.take(led):
            led = OTHER, OTHER, reason
        recorder.series(defined.ROUTE_REQUESTS, *led).inc()

    @_failing_no_request
    def count_tokens(self, recorder: Recorder, usage: Usage) -> None:
        adapter = BLENDS if usage.is_blend else usage.adapter or ""
        if usage.prompt_tokens:  # it was served
            recorder.names.admit(adapter)
        label = recorder.names.label(adapter)
        user = (label, fit(usage.route or ""), usage.tenant or "")
        if not recorder.users.take(user):
            user = (OTHER, "", "")
        counted = (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens)
        for definition, tokens in zip(defined.TOKENS, counted, strict=True):
            recorder.series(definition, *user).inc(tokens)

    @_failing_no_request
    def count_latencies(
        self, recorder: Recorder, adapter: str, first_s: float, per_token_s: float | None
    ) -> None:
        """Counts a request's seconds to its first token, and per token where it had several."""
        recorder.names.admit(adapter)  # it was served
        label = recorder.names.label(adapter)
        recorder.histogram(defined.FIRST_TOKEN, label).observe(first_s)
        if per_token_s is not None:
            recorder.histogram(defined.PER_TOKEN, label).observe(per_token_s)

    @_failing_no_request
    def count_refused(self, recorder: Recorder, tenant: str | None, status: int) -> None:
        """Counts a request that was refused for who sent it; None: nobody, or no tenant."""
        who = (tenant or "", str(status))
        # Names of a file that changes may be any number of them.
        if not recorder.refused.take(who):
            who = (OTHER, str(status))
        recorder.series(defined.REFUSED, *who).inc()

    @_failing_no_request
    def count_limited(
        self, recorder: Recorder, tenant: str, tokens: int, per_minute: float
    ) -> None:
        """Counts tokens against a tenant's limit per minute."""
        if recorder.tenants.take((tenant,)):
            recorder.series(defined.TENANT_TOKENS, tenant).inc(tokens)
            recorder.series(defined.TENANT_LIMIT, tenant).set(per_minute)

    @_failing_no_request
    def count_dropped(self, recorder: Recorder, lines: int) -> None:
        """Counts lines that the usage log lacks."""
        recorder.series(defined.USAGE_LINES_DROPPED).inc(lines)

    def find(self) -> Recorder | None:
        if self._recorder is not None or self._make_recorder is None:
            return self._recorder
        if (now := self._clock()) >= self._next_try:
            self._next_try = now + _RETRY_S
            self._recorder = self._make_recorder()
        return self._recorder


COUNTS = ServerCounts()
