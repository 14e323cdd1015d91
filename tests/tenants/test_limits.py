"""What a tenant may use at once, and what is counted when."""

import asyncio
import weakref

import pytest

from tests.event_loop import in_event_loop
from vllm_multilora.tenants.limits import (
    MAX_TEXT_BYTES,
    Account,
    LimitReachedError,
    Meter,
    Pace,
    TokenBucket,
)
from vllm_multilora.tenants.tenant import Tenant, TenantLimits


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def account(clock=None, servers=1, **limits):
    return Account(Tenant("acme", limits=TenantLimits(**limits)), servers, clock or Clock())


def test_rate_headers_say_what_is_left_of_all_servers_tokens():
    clock = Clock()
    found = account(clock, servers=2, tokens_per_minute=600)
    prefix = "x-ratelimit-"
    for used, remaining, reset in ((0, "600", "0s"), (100, "400", "20s"), (400, "0", "100s")):
        found.charge(used)
        assert found.rate_headers() == {
            f"{prefix}limit-tokens": "600",
            f"{prefix}remaining-tokens": remaining,
            f"{prefix}reset-tokens": reset,
        }
    assert account(running=3).rate_headers() == {}


def test_charged_tokens_go_to_whoever_counts_them():
    charged = []
    limits = TenantLimits(tokens_per_minute=600)
    note = lambda *charge: charged.append(charge)  # noqa: E731
    found = Account(Tenant("acme", limits=limits), 2, Clock(), on_charge=note)
    found.charge(100)
    assert found.tokens_used == 200  # of two servers, if the other one is used as much
    assert charged == [("acme", 100, 600)]
    free = Account(Tenant("free"), 1, Clock(), on_charge=note)
    free.charge(7)
    assert free.tokens_used is None
    assert len(charged) == 1


@in_event_loop
async def test_calls_wait_in_order_and_then_are_refused():
    found = account(running=1, waiting=2)
    first, second, third = (found.begin() for _ in range(3))
    assert [turn.done() for turn in (first, second, third)] == [True, False, False]
    reached = r"the limits of running calls \(1\) and of waiting ones \(2\) are reached"
    with pytest.raises(LimitReachedError, match=reached) as caught:
        found.begin()
    assert caught.value.retry_after_s == 1
    found.end()
    assert (second.done(), third.done()) == (True, False)
    found.end()
    found.end()
    assert third.done()
    assert (found.running, found.waiting) == (0, 0)


@in_event_loop
async def test_a_call_that_gives_up_makes_room():
    found = account(running=1, waiting=1)
    found.begin()
    waiting = found.begin()
    found.give_up(waiting)
    assert (found.running, found.waiting) == (1, 0)
    assert waiting.cancelled()
    given = found.begin()
    found.end()
    assert given.done()
    found.give_up(given)  # it has had its turn in the same moment
    assert (found.running, found.waiting) == (0, 0)


@in_event_loop
async def test_a_newer_file_lets_more_in_and_takes_nothing_away():
    found = account(running=1)
    turns = [found.begin() for _ in range(4)]
    found.update(Tenant("acme", limits=TenantLimits(running=3)))
    assert [turn.done() for turn in turns] == [True, True, True, False]
    found.update(Tenant("acme", limits=TenantLimits(running=1)))
    found.end()
    found.end()
    assert not turns[3].done()
    found.end()
    assert turns[3].done()


def test_a_bucket_lets_a_minutes_worth_through_and_then_the_rate():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.charge(59)
    assert bucket.wait_s() == 0
    bucket.charge(100)
    assert bucket.wait_s() == 100
    clock.now = 99
    assert bucket.wait_s() == 1
    clock.now = 100
    assert bucket.wait_s() == 0
    clock.now = 100_000
    bucket.charge(61)
    assert bucket.wait_s() == 2


def test_a_rate_that_falls_takes_what_was_saved():
    clock = Clock()
    bucket = TokenBucket(600, clock)
    bucket.set_rate(60)
    bucket.charge(60)
    assert bucket.wait_s() == 1


def test_what_has_risen_until_a_rate_changes_has_risen_at_the_old_one():
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.charge(120)
    clock.now = 30
    bucket.set_rate(600)
    assert bucket.wait_s() == (1 + 30) * 60 / 600


@in_event_loop
async def test_what_was_used_counts_though_the_file_has_changed():
    found = account(tokens_per_minute=60)
    found.charge(120)
    found.update(Tenant("acme", limits=TenantLimits(tokens_per_minute=60, running=3)))
    with pytest.raises(LimitReachedError) as caught:
        found.begin()
    assert caught.value.retry_after_s == 61
    found.update(Tenant("acme", limits=TenantLimits(tokens_per_minute=6)))
    with pytest.raises(LimitReachedError) as caught:
        found.begin()
    assert caught.value.retry_after_s == 610


@in_event_loop
async def test_whoever_gives_up_its_turn_for_a_list_while_it_pauses_keeps_nobody_waiting():
    clock = Clock()
    pace = Pace(clock)
    await pace.begin()
    pace.end(60.0)
    waiting = asyncio.create_task(pace.begin())
    for _ in range(3):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()
    clock.now = 60.0
    async with asyncio.timeout(10):
        await pace.begin()


@in_event_loop
async def test_tokens_are_charged_as_they_come():
    clock, tokens, ended = Clock(), 0, False
    found = account(clock, tokens_per_minute=60)
    found.begin()
    found.charge(30)
    found.watch(Meter(lambda: tokens, lambda: ended))
    tokens = 20
    found.begin()
    tokens, ended = 90, True
    with pytest.raises(LimitReachedError, match=r"tokens per minute \(60\)") as caught:
        found.begin()
    assert caught.value.retry_after_s == 61
    tokens = 1000  # nobody looks any more
    clock.now = 61
    found.begin()


@in_event_loop
async def test_reading_what_very_many_requests_have_generated_takes_a_small_part_of_the_time():
    """Calls that are refused read it, too."""
    clock, read = Clock(), []

    def tokens():
        clock.now += 0.001
        read.append(clock.now)
        return 1

    found = account(clock, tokens_per_minute=600)
    for _ in range(100):
        found.watch(Meter(tokens, lambda: False))
    for _ in range(50):
        found.begin()
    assert len(read) == 100
    clock.now += 5
    found.begin()
    assert len(read) == 200


@in_event_loop
async def test_nothing_of_a_tenants_requests_is_kept_while_it_is_away():
    class State:
        ended = False

    clock = Clock()
    found = account(clock, tokens_per_minute=600)

    def watched():
        state = State()

        def read():
            clock.now += 0.001  # so that nothing is read soon after
            return 1

        found.begin()
        found.watch(Meter(read, lambda: state.ended))
        return state

    states = [watched(), watched()]
    gone = [weakref.ref(state) for state in states]
    while states:
        states.pop().ended = True
        found.end()
    assert [state() for state in gone] == [None, None]


@in_event_loop
async def test_calls_that_wait_begin_at_the_rate_too():
    """Each uses 100 tokens in a second, and 60 a minute are allowed."""
    clock = Clock()
    found = account(clock, running=1, tokens_per_minute=60)
    first, *waiting = (found.begin() for _ in range(4))
    assert first.done()
    for turn in waiting:
        found.charge(100)
        clock.now += 1
        found.end()
        assert not turn.done()
        with pytest.raises(LimitReachedError, match=r"tokens per minute \(60\)"):
            found.begin()  # nor does one that comes later
        clock.now += 100
        found.update(found.tenant)
        assert turn.done()
    assert [turn.done() for turn in waiting] == [True, True, True]
    assert (found.running, found.waiting) == (1, 0)


@in_event_loop
async def test_calls_that_wait_are_before_those_that_come_when_there_are_tokens_again():
    clock = Clock()
    found = account(clock, running=1, tokens_per_minute=60)
    found.begin()
    waits = found.begin()
    found.charge(100)
    found.end()
    clock.now = 100
    assert not found.begin().done()
    assert waits.done()
    assert (found.running, found.waiting) == (1, 1)


@in_event_loop
async def test_calls_that_wait_for_tokens_alone_begin_by_themselves():
    found = Account(Tenant("acme", limits=TenantLimits(running=2, tokens_per_minute=60_000)))
    turns = [found.begin() for _ in range(4)]
    tokens = 60_200
    found.watch(Meter(lambda: tokens, lambda: False))
    found.end()
    tokens += 200  # 400 more than there are, which take 400 ms
    found.end()
    assert not any(turn.done() for turn in turns[2:])
    async with asyncio.timeout(30):
        await asyncio.gather(*turns)
    assert (found.running, found.waiting) == (2, 0)


@in_event_loop
async def test_a_higher_rate_lets_those_in_that_wait_for_tokens():
    found = account(running=1, tokens_per_minute=60)
    found.begin()
    waits = found.begin()
    found.charge(1000)
    found.end()
    assert not waits.done()
    found.update(Tenant("acme", limits=TenantLimits(running=1)))
    assert waits.done()


@in_event_loop
async def test_every_api_server_has_its_part():
    found = account(servers=2, running=3, tokens_per_minute=60)
    assert [found.begin().done() for _ in range(3)] == [True, True, False]
    found.charge(31)
    with pytest.raises(LimitReachedError) as caught:
        found.begin()
    assert caught.value.retry_after_s == 4


def test_different_adapters_are_counted_while_they_are_used():
    found = account(adapters=2)
    for name in ("a", "b", "a"):
        found.use(name)
    with pytest.raises(LimitReachedError, match=r"different adapters in use \(2\)"):
        found.use("c")
    found.release("a")
    with pytest.raises(LimitReachedError):
        found.use("c")
    found.release("a")
    found.use("c")


@in_event_loop
async def test_what_requests_generate_is_not_followed_where_nothing_limits_it():
    found = account(running=1)
    found.watch(Meter(lambda: 0, lambda: False))
    assert found.is_idle


@in_event_loop
async def test_texts_of_a_tenant_when_many_wait_for_the_tokenizer_wait_for_each_other():
    account, order = Account(Tenant("acme")), []

    async def read(name, size):
        await account.begin_text(size)
        order.append(name)

    half = MAX_TEXT_BYTES // 2
    await asyncio.gather(read("a", half), read("b", half))
    names = {"long": 2 * MAX_TEXT_BYTES, "gone": 1, "last": 1}
    waiting = {name: asyncio.create_task(read(name, size)) for name, size in names.items()}
    await asyncio.sleep(0)
    waiting["gone"].cancel()
    account.end_text(half)
    await asyncio.sleep(0)
    assert order == ["a", "b"]
    account.end_text(half)
    await asyncio.wait_for(waiting["long"], 5)
    assert not waiting["last"].done()
    account.end_text(names["long"])
    await asyncio.wait_for(waiting["last"], 5)


@in_event_loop
async def test_text_that_is_given_up_when_it_has_its_turn_makes_room():
    account = Account(Tenant("acme"))
    await account.begin_text(MAX_TEXT_BYTES)
    given_up = asyncio.create_task(account.begin_text(MAX_TEXT_BYTES))
    await asyncio.sleep(0)
    account.end_text(MAX_TEXT_BYTES)
    given_up.cancel()
    await asyncio.wait_for(account.begin_text(MAX_TEXT_BYTES), 5)
