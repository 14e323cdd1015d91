"""What a tenant uses at the moment, against its limits; for one event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.tenants.rules import Endpoint
from vllm_multilora.tenants.tenant import Tenant


class LimitReachedError(MultiLoRAError):
    """A call that is one too many.

    Attributes:
        retry_after_s: Whole seconds after which it may be tried again.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = math.ceil(retry_after_s)


class ServerStoppedError(MultiLoRAError):
    """A call that would have to wait for its turn, in a server that is being stopped."""


class TokenBucket:
    """A rate that may be exceeded for a while: a minute's worth at once after a pause.

    What a request costs is known when it ends, so the level may fall below zero; no call begins
    then until it has risen above. The clock says the time in seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._level = per_minute
        self._per_minute = per_minute
        self._at = clock()

    def set_rate(self, per_minute: float) -> None:
        self._fill()
        self._per_minute = per_minute

    def charge(self, tokens: int) -> None:
        self._fill()
        self._level -= tokens

    @property
    def used(self) -> float:
        """Tokens that have been taken out and have not come again."""
        self._fill()
        return self._per_minute - self._level

    def wait_s(self) -> float:
        """Seconds until a call may begin; 0 where it may now."""
        self._fill()
        return 0.0 if self._level > 0 else (1 - self._level) * 60 / self._per_minute

    def _fill(self) -> None:
        now = self._clock()
        risen = self._level + (now - self._at) * self._per_minute / 60
        self._level, self._at = min(risen, self._per_minute), now


@dataclass
class Meter:
    """A request's generated tokens, read when somebody wants to know; some have been charged."""

    read: Callable[[], int]
    has_ended: Callable[[], bool]
    counted: int = 0


class Pace:
    """Something that is done once at a time, with pauses."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._turn = asyncio.Lock()
        self._not_before = -math.inf

    async def begin(self) -> None:
        """Waits for its turn; whoever has had it ends it."""
        await self._turn.acquire()
        try:
            if (pause_s := self._not_before - self._clock()) > 0:
                await asyncio.sleep(pause_s)
        except BaseException:
            self._turn.release()
            raise

    def end(self, pause_s: float) -> None:
        """It is done; the next time is after a pause."""
        self._not_before = self._clock() + pause_s
        self._turn.release()


MAX_FIRST_READINGS = 2
"""Adapters of a tenant that an API server looks for, or has read for the first time, at once."""

WITHOUT_TURN_PER_MINUTE = 3_000
"""A tenant's requests that are refused without having a turn; after a minute without any, so many
at once."""

MAX_TEXT_BYTES = 256 << 10
"""Bytes of a tenant's calls whose texts wait for vLLM's tokenizer at a time, unless it is one call.
One thread of an API server makes tokens of all texts in their order, a megabyte in two seconds."""

SETTLING_SHARE = 0.02
"""Share of the time for reading what a tenant's requests have generated."""

_STOPPED = "the server is being stopped"

_ACCOUNTS: WeakSet[Account] = WeakSet()


def stop_waiting() -> None:
    """Refuses calls that wait for their turn: the engine stops, and the server waits for all."""
    for account in _ACCOUNTS:
        account.stop()


class Account:
    """One tenant in one of the API servers that share its limits.

    Attributes:
        tenant: As the tenants file has it now.
        running: Calls that are worked for.
        first_readings: To be held while an adapter is looked for, and read for the first time.
            Neither the thread that looks nor the engine is told whose that is, so others' adapters
            wait for few of a tenant's.
        listing: How its models are listed, and its adapters.
        without_turn: Its requests that limits do not count, since they have no turn.
    """

    def __init__(
        self,
        tenant: Tenant,
        servers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        on_charge: Callable[[str, int, float], None] | None = None,
    ) -> None:
        self._servers = servers
        self._on_charge = on_charge
        self._clock = clock
        self.running = 0
        self._is_stopped = False
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._adapters: Counter[str] = Counter()
        self._answers = 0
        self._text_bytes = 0
        self._text_turn, self._text_ended = asyncio.Lock(), asyncio.Event()
        self._meters: list[Meter] = []
        self._settles_at = -math.inf
        self._bucket: TokenBucket | None = None
        self._refilled: asyncio.TimerHandle | None = None
        self.first_readings = asyncio.Semaphore(MAX_FIRST_READINGS)
        self.listing: defaultdict[Endpoint, Pace] = defaultdict(lambda: Pace(clock))
        self.without_turn = TokenBucket(WITHOUT_TURN_PER_MINUTE, clock)
        self.update(tenant)
        _ACCOUNTS.add(self)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def adapters_in_use(self) -> int:
        return len(self._adapters)

    @property
    def is_idle(self) -> bool:
        """Whether it is as one of a tenant that has never come."""
        self.settle()
        uses = self.running or self._waiting or self._adapters or self._meters
        return not uses and (self._bucket is None or self._bucket.used <= 0)

    def update(self, tenant: Tenant) -> None:
        """Puts what a newer file says in force; what runs and what was used stays counted."""
        self.tenant = tenant
        self._limits = tenant.limits.divided(self._servers)
        rate = self._limits.tokens_per_minute
        if rate is None:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(rate, self._clock)
        else:
            self._bucket.set_rate(rate)
        self._admit()

    def begin(self) -> asyncio.Future[None]:
        """Begins a call, and returns what is done when it has its turn.

        A call that has had its turn ends with `end`; one that does not want it any more gives it
        back with `give_up`.

        Raises:
            LimitReachedError: The tenant has too many calls waiting, or has used up its tokens.
            ServerStoppedError: It would have to wait after `stop`, which ends waiting calls so too.
        """
        self._admit()  # those that have waited come first
        limits = self._limits
        if (wait := self._wait_s()) > 0:
            raise LimitReachedError(
                f"the limit of tokens per minute ({self.tenant.limits.tokens_per_minute:,.0f}) is "
                "used up",
                wait,
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._is_full():
            self.running += 1
            turn.set_result(None)
        elif limits.waiting is not None and len(self._waiting) >= limits.waiting:
            raise LimitReachedError(
                f"the limits of running calls ({self.tenant.limits.running}) and of waiting ones "
                f"({self.tenant.limits.waiting}) are reached"
            )
        elif self._is_stopped:
            raise ServerStoppedError(_STOPPED)
        else:
            self._waiting.append(turn)
        return turn

    def stop(self) -> None:
        self._is_stopped = True
        while self._waiting:
            self._waiting.popleft().set_exception(ServerStoppedError(_STOPPED))

    def give_up(self, turn: asyncio.Future[None]) -> None:
        """Takes a call back that has not begun; gives its turn to the next where it had one."""
        if turn.done():
            if turn.exception() is None:
                self.end()
        else:
            self._waiting.remove(turn)
            turn.cancel()

    def end(self) -> None:
        """Ends a call that had its turn."""
        self.running -= 1
        if not self.running:  # the tenant may stay away, and its meters have its requests
            self._settles_at = -math.inf
        self._admit()

    def use(self, adapter: str) -> None:
        """Counts an adapter as in use until `release`.

        Raises:
            LimitReachedError: The tenant uses as many others already.
        """
        limit = self._limits.adapters
        if limit is not None and adapter not in self._adapters and len(self._adapters) >= limit:
            raise LimitReachedError(f"the limit of different adapters in use ({limit}) is reached")
        self._adapters[adapter] += 1

    def release(self, adapter: str) -> None:
        self._adapters[adapter] -= 1
        if not self._adapters[adapter]:
            del self._adapters[adapter]

    @property
    def most_answers(self) -> int | None:
        """Answers that a tenant's running calls may have in flight; None if there is no limit."""
        return self._limits.answers

    def reserve_answers(self, answers: int) -> None:
        """Counts answers that a call wants, until `release_answers`.

        Raises:
            LimitReachedError: The tenant's calls want too many together.
        """
        limit = self._limits.answers
        if limit is not None and self._answers + answers > limit:
            raise LimitReachedError(f"the limit of answers at a time ({limit}) is reached")
        self._answers += answers

    def release_answers(self, answers: int) -> None:
        self._answers -= answers

    async def begin_text(self, size: int) -> None:
        """Waits until vLLM may make tokens of a body of some bytes; whoever has waited ends it."""
        async with self._text_turn:  # in the order in which they come
            while self._text_bytes and self._text_bytes + size > MAX_TEXT_BYTES:
                self._text_ended.clear()
                await self._text_ended.wait()
            self._text_bytes += size

    def end_text(self, size: int) -> None:
        self._text_bytes -= size
        self._text_ended.set()

    def charge(self, tokens: int) -> None:
        if self._bucket is None:
            return
        self._bucket.charge(tokens)
        limit = self.tenant.limits.tokens_per_minute
        if self._on_charge is not None and limit is not None:
            self._on_charge(self.tenant.name, tokens, limit)

    @property
    def tokens_used(self) -> float | None:
        """Tokens that count against the limit per minute now; None if there is no limit.

        They are those of all API servers, as if each had used as much as this one.
        """
        self.settle()
        return None if self._bucket is None else max(0.0, self._bucket.used * self._servers)

    def rate_headers(self) -> dict[str, str]:
        """What OpenAI's clients read of a limit of tokens per minute; empty if there is none."""
        limit, used = self.tenant.limits.tokens_per_minute, self.tokens_used
        if limit is None or used is None:
            return {}
        return {
            "x-ratelimit-limit-tokens": f"{limit:.0f}",
            "x-ratelimit-remaining-tokens": f"{max(0.0, limit - used):.0f}",
            "x-ratelimit-reset-tokens": f"{math.ceil(60 * used / limit)}s",
        }

    def watch(self, meter: Meter) -> None:
        """Charges a request's tokens as they come, whenever the tenant's calls begin or end."""
        if self._bucket is not None:
            self._meters.append(meter)

    def settle(self) -> None:
        """Charges what requests have generated since the last time, if that was not just now.

        A tenant may have very many requests, and calls that are refused.
        """
        begun = self._clock()
        if not self._meters or begun < self._settles_at:
            return
        left = []
        for meter in self._meters:
            ended, generated = meter.has_ended(), meter.read()
            self.charge(generated - meter.counted)
            meter.counted = generated
            if not ended:
                left.append(meter)
        self._meters = left
        self._settles_at = begun + (self._clock() - begun) / SETTLING_SHARE

    def _is_full(self) -> bool:
        return self._limits.running is not None and self.running >= self._limits.running

    def _wait_s(self) -> float:
        return 0.0 if self._bucket is None else self._bucket.wait_s()

    def _admit(self) -> None:
        """Gives waiting calls their turn, as far as there are places, once there are tokens."""
        self.settle()
        if self._refilled is not None:
            self._refilled.cancel()
            self._refilled = None
        while self._waiting and not self._is_full():
            if (wait := self._wait_s()) > 0:
                loop = asyncio.get_running_loop()
                self._refilled = loop.call_later(wait, self._admit)
                return
            self.running += 1
            self._waiting.popleft().set_result(None)
