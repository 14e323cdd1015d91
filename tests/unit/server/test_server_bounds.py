"""What an API server keeps of, and does for, clients that ask again and again."""

import asyncio
import gc
import json
import os
import threading
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.gateway.status.status_route import MAX_SHARE, NEW_S, RecentListing
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.registered_versions import Version
from vllm_multilora.integration.blends import blended
from vllm_multilora.integration.failed_requests import from_stop_reason, to_stop_reason
from vllm_multilora.integration.server.names import registration, routes, shared_names
from vllm_multilora.integration.server.names.adapter_directory import PendingLooks
from vllm_multilora.integration.server.names.refusals import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Refusals,
)
from vllm_multilora.integration.server.requests import engine_admission, http_calls
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call

ANSWER: Any = SimpleNamespace()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_name_has_one_lock_while_it_is_worked_with_and_none_afterwards() -> None:
    async def scenario() -> int:
        locks, inside = registration.LocksInUse(), []

        async def work(number: int) -> None:
            async with locks["acme"]:
                inside.append(number)
                assert len(locks) == 1
                await asyncio.sleep(0)
                assert inside[-1] == number

        await asyncio.gather(*(work(number) for number in range(20)))
        for number in range(1000):
            async with locks[f"junk-{number}"]:
                pass
        gc.collect()
        assert len(inside) == 20
        return len(locks)

    assert asyncio.run(scenario()) <= 1


def test_a_name_that_no_adapter_has_is_not_searched_for_a_version(monkeypatch: Any) -> None:
    """Nobody is answered meanwhile: ten million characters take a second."""
    searched: list[str] = []

    class Asks:
        def fullmatch(self, name: str) -> Any:
            searched.append(name)
            return asks.fullmatch(name)

    asks = http_calls._ASKS
    monkeypatch.setattr(http_calls, "_ASKS", Asks())
    longest = "x" * 255
    for name, taken in (
        (f"{longest}@{'0' * 64}", "0" * 64),
        (f"{longest}x@{'0' * 64}", ""),
        ("@" * 1_000_000, ""),
    ):
        found = http_calls.split(name, (), is_name=lambda name: False)
        assert found == (longest if taken else name, taken)
    assert len(searched) == 1


def test_a_refused_adapter_is_tried_again_after_pauses_that_double_up_to_a_minute() -> None:
    clock = Clock()
    refusals, pauses = Refusals(clock), []
    for _ in range(8):
        assert refusals.find("acme") is None
        refusals.remember("acme", ANSWER)
        began = clock.now
        while refusals.find("acme") is not None:
            clock.now += 1
        pauses.append(clock.now - began)
    assert pauses == [FIRST_PAUSE_S, 4, 8, 16, 32, *[LONGEST_PAUSE_S] * 3]
    assert refusals.last("acme") is ANSWER
    refusals.forget("acme")
    assert refusals.last("acme") is None
    refusals.remember("acme", ANSWER)
    clock.now += FIRST_PAUSE_S
    assert refusals.find("acme") is None


def test_only_the_last_thousand_refusals_are_remembered() -> None:
    refusals = Refusals()
    for number in range(5000):
        refusals.remember(number, ANSWER)
    assert len(refusals) == 1024
    assert refusals.find(4999) is ANSWER


def test_routes_try_a_failed_adapter_again_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def admit(models: Any, lora: Any) -> Any:
        return None if len(slept) == 8 else ANSWER

    monkeypatch.setattr(routes, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(registration, "admit", admit)
    lora: Any = SimpleNamespace(lora_name="acme", lora_int_id=1, lora_path="/adapters/acme")
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models = SimpleNamespace(lora_requests={"acme": lora})
    server._failed = {1: LoadFailure(FailureKind.GONE, "gone")}
    asyncio.run(server._try_again(lora))
    assert slept == [5, 10, 20, 40, 60, 60, 60, 60]
    assert server._failed == {}


def test_routes_lead_to_no_quarantined_adapter_before_it_has_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora: Any = SimpleNamespace(lora_name="acme", lora_int_id=1, lora_path="/adapters/acme")
    models = SimpleNamespace(lora_requests={"acme": lora})
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 1:  # the load that failed has been made up for, and what it brought is bad
            server.note_failure(lora, LoadFailure(FailureKind.QUARANTINED, "not finite"))
        if len(slept) == 7:
            models.lora_requests["acme"] = SimpleNamespace(lora_int_id=2)  # other weights
        assert server._failed[1].kind is FailureKind.QUARANTINED

    async def admit(models: Any, lora: Any) -> Any:
        raise AssertionError("the engine has it, and serves it to nobody")

    async def remove_later(models: Any, lora: Any) -> None: ...

    async def scenario() -> None:
        server.note_failure(lora, LoadFailure(FailureKind.GONE, "gone"))
        await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)

    monkeypatch.setattr(routes, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(registration, "admit", admit)
    monkeypatch.setattr(registration, "remove_later", remove_later)
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models, server._failed = models, {}
    asyncio.run(scenario())
    assert slept == [5, 10, 20, 40, 60, 60, 60]
    assert server._failed == {}


def test_routes_lead_on_to_an_adapter_whose_invocation_a_prompt_lacks() -> None:
    lora: Any = SimpleNamespace(lora_name="acme", lora_int_id=1, lora_path="/adapters/acme")
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models, server._failed = SimpleNamespace(lora_requests={"acme": lora}), {}
    server.note_failure(lora, RequestFailure(FailureKind.INVALID, "no invocation"))
    assert server._failed == {}


@pytest.mark.parametrize("moment", ["while it waits", "while it reads"])
def test_routes_bring_no_adapter_back_that_was_unloaded(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    lora: Any = SimpleNamespace(lora_name="acme", lora_int_id=1, lora_path="/adapters/acme")
    models = SimpleNamespace(lora_requests={"acme": lora})
    held: set[int] = set()

    def unload() -> None:
        del models.lora_requests["acme"]
        held.discard(1)

    async def sleep(seconds: float) -> None:
        if moment == "while it waits":
            unload()

    async def admit(models: Any, lora: Any) -> Any:
        if moment == "while it reads":
            unload()
        held.add(lora.lora_int_id)

    async def remove(models: Any, lora: Any) -> None:
        held.discard(lora.lora_int_id)

    async def scenario() -> None:
        await server._try_again(lora)
        if moment == "while it waits":
            assert held == set()  # nothing was read at all
        await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)

    monkeypatch.setattr(routes, "asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(registration, "admit", admit)
    monkeypatch.setattr(registration, "remove", remove)
    monkeypatch.setattr(registration.remove_later, "__defaults__", (0.0,))
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models = models
    server._failed = {1: LoadFailure(FailureKind.GONE, "gone")}
    asyncio.run(scenario())
    assert held == set()
    assert server._failed == {}


def test_a_routes_file_on_storage_that_hangs_keeps_nobody_waiting_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "routes.yaml"
    path.write_text("routes: {help: base}")
    models = SimpleNamespace(
        lora_requests={},
        base_model_paths=[SimpleNamespace(name="base")],
        is_base_model=lambda name: name == "base",
    )
    answers = threading.Event()
    monkeypatch.setattr(routes, "LOOK_LIMIT_S", 0.05)

    async def scenario() -> list[str]:
        server: Any = routes.ServerRoutes(models, str(path))
        server._file.refresh = lambda: answers.wait(60) and False
        try:
            for _ in range(2):
                await asyncio.wait_for(server.look_for("nobody"), 20)
            return [card.id for card in await asyncio.wait_for(server.cards(), 20)]
        finally:
            answers.set()

    assert asyncio.run(scenario()) == ["help"]


@pytest.mark.parametrize("cost_s", [0.0, 0.99 * MAX_SHARE * NEW_S], ids=["free", "cheap"])
def test_the_engine_is_asked_for_a_listing_once_a_second_whoever_asks(cost_s: float) -> None:
    async def scenario() -> None:
        clock, calls = Clock(), 0
        listing = RecentListing(clock)

        async def ask() -> Any:
            nonlocal calls
            calls += 1
            number = calls
            await asyncio.sleep(0)
            return b"%d" % number, cost_s

        found = await asyncio.gather(*(listing.get([1, 2], ask) for _ in range(500)))
        assert set(found) == {b"1"}
        clock.now += 0.9 * NEW_S
        tag = listing.tag
        assert await listing.get([1, 2], ask) == b"1"
        assert listing.tag == tag
        assert await listing.get([1, 2, 3], ask) == b"2"  # an adapter has come
        assert listing.tag != tag
        clock.now += NEW_S
        assert await listing.get([1, 2, 3], ask) == b"3"

    asyncio.run(scenario())


@pytest.mark.parametrize("coming", [0, 1], ids=["the same adapters", "adapters come"])
def test_listings_take_a_small_share_of_the_time_however_long_each_takes(coming: int) -> None:
    async def scenario() -> None:
        clock, calls, cost_s = Clock(), 0, 0.3
        listing = RecentListing(clock)

        async def ask() -> Any:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            return {}, cost_s

        for number in range(600):
            many = (listing.get([coming * (2 * number + i)], ask) for i in range(2))
            await asyncio.gather(*many)
            clock.now += 0.1
        assert 1 < calls <= 60 * MAX_SHARE / cost_s + 1

    asyncio.run(scenario())


def test_what_somebody_sees_of_a_listing_is_made_once() -> None:
    listing, made = RecentListing(Clock()), []

    def show(what: str) -> dict[str, Any]:
        made.append(what)
        return {"data": what}

    first, second = {"data": []}, {"data": []}
    for _ in range(3):
        for who in ("acme", None):
            found = listing.body(first, who, lambda who=who: show(f"{who}'s"))
            assert json.loads(found) == {"data": f"{who}'s"}
    assert made == ["acme's", "None's"]
    assert json.loads(listing.body(second, "acme", lambda: show("new"))) == {"data": "new"}


def test_what_somebody_sees_of_a_listing_is_in_what_it_costs() -> None:
    async def scenario() -> None:
        clock, asked = Clock(), []
        listing = RecentListing(clock)

        async def ask() -> Any:
            asked.append(clock.now)
            return {}, 0.0

        def show() -> dict[str, Any]:
            clock.now += 2 * NEW_S * MAX_SHARE
            return {}

        for who in ("acme", "zen"):
            listing.body(await listing.get([], ask), who, show)
        clock.now = asked[0] + 3.9 * NEW_S
        await listing.get([], ask)
        assert len(asked) == 1
        clock.now = asked[0] + 4.1 * NEW_S
        await listing.get([], ask)
        assert len(asked) == 2

    asyncio.run(scenario())


def test_a_listing_that_could_not_be_had_is_asked_for_again() -> None:
    async def scenario() -> None:
        listing, failing = RecentListing(Clock()), True

        async def ask() -> Any:
            if failing:
                raise TimeoutError
            return b"here", 0.0

        for _ in range(2):
            with pytest.raises(TimeoutError):
                await listing.get([], ask)
        failing = False
        assert await listing.get([], ask) == b"here"

    asyncio.run(scenario())


class Engine:
    """Refuses what it is asked to read, as one of several engines may."""

    def __init__(self) -> None:
        self.engine_core = self
        self.asked: list[int] = []
        self.removed: list[int] = []
        self.output_processor: Any = None

    core_engines = ("the only one",)

    async def _call_utility_async(self, *call: Any, engine: str) -> dict[str, Any]:
        [fields] = call[3]
        await self.register(fields["lora_int_id"])
        return {}

    async def register(self, number: int) -> None:
        self.asked.append(number)
        raise RuntimeError("refused")

    async def remove_lora_async(self, number: int) -> bool:
        self.removed.append(number)
        return True


def test_a_registration_touches_no_path_here_and_leaves_nothing_in_other_engines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mount that hangs would hold the event loop, and every stream with it."""

    def touch(*_: Any, **__: Any) -> None:
        raise AssertionError("the path was looked at")

    async def scenario() -> Any:
        engine, numbers = Engine(), AtomicCounter(0)
        models = SimpleNamespace(
            engine_client=engine,
            lora_requests={},
            lora_id_counter=numbers,
            is_base_model="base".__eq__,
        )
        request = SimpleNamespace(
            lora_name="acme", lora_path="/hung", load_inplace=False, is_3d_lora_weight=False
        )
        with monkeypatch.context() as patch:
            for module, name in ((os, "stat"), (os, "open"), (os.path, "realpath")):
                patch.setattr(module, name, touch)
            answer = await registration.load_adapter(models, request)
        async with asyncio.timeout(10):
            while not engine.removed:
                await asyncio.sleep(0)
        assert engine.asked == engine.removed == [1]
        return answer

    assert asyncio.run(scenario()).error.code == 500


def test_no_more_adapters_are_registered_than_a_server_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registration, "MAX_ADAPTERS", 1)
    monkeypatch.setattr(registration, "admit", None)  # is not asked
    models = SimpleNamespace(lora_requests={"other": LoRARequest("other", 1, "/adapters/other")})
    request = SimpleNamespace(lora_name="acme", lora_path="/adapters/acme")
    refusal: Any = asyncio.run(registration.load_adapter(models, request))
    assert refusal.error.code == HTTPStatus.BAD_REQUEST
    assert "this server has 1 adapters, and serves no more" in refusal.error.message
    assert registration.one_too_many(models, "other", "lora_name") is None  # replaces its own


def test_a_registration_that_is_given_up_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a middleware with a time limit, say: the engine has the adapter all the same."""
    monkeypatch.setattr(registration, "acts_for", lambda models: True)

    async def scenario() -> None:
        is_asked, may_read = asyncio.Event(), asyncio.Event()

        class SlowEngine(Engine):
            async def register(self, number: int) -> None:
                is_asked.set()
                await asyncio.wait_for(may_read.wait(), 10)

        models = SimpleNamespace(
            engine_client=SlowEngine(),
            lora_requests={},
            lora_id_counter=AtomicCounter(0),
            is_base_model="base".__eq__,
        )
        request = SimpleNamespace(
            lora_name="acme", lora_path="/acme", load_inplace=False, is_3d_lora_weight=False
        )
        load = registration.load(models, request)
        call = asyncio.create_task(load)
        await asyncio.wait_for(is_asked.wait(), 10)
        call.cancel()
        await asyncio.wait({call}, timeout=10)
        assert call.cancelled()
        may_read.set()
        await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)
        assert models.lora_requests["acme"].lora_int_id == 1

    asyncio.run(scenario())


def test_an_unload_that_is_given_up_is_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    monkeypatch.setattr(registration, "remove_later", nothing)

    async def scenario() -> None:
        is_asked, may_go = asyncio.Event(), asyncio.Event()

        async def retract(models: Any, lora: Any) -> None:
            is_asked.set()
            await asyncio.wait_for(may_go.wait(), 10)

        monkeypatch.setattr(shared_names, "retract", retract)
        models = SimpleNamespace(
            engine_client=Engine(),
            lora_requests={"acme": lora_of("acme", 1)},
        )
        request = SimpleNamespace(lora_name="acme")
        unload = registration.unload(models, request)
        call = asyncio.create_task(unload)
        await asyncio.wait_for(is_asked.wait(), 10)
        call.cancel()
        await asyncio.wait({call}, timeout=10)
        assert call.cancelled()
        may_go.set()
        await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)
        assert models.engine_client.removed == [1]

    asyncio.run(scenario())


async def nothing(*_: Any) -> None: ...


def followed(engine: Any) -> Any:
    """With requests that are checked and followed, as a server's."""
    engine.output_processor = SimpleNamespace(request_states={})
    engine_admission.follow(engine.output_processor)
    return engine


def add(engine: Any, request_id: str, lora: Any) -> None:
    engine.output_processor.request_states[request_id] = SimpleNamespace(
        request_id=request_id, parent_req=None, external_req_id="", lora_request=lora
    )


def test_an_adapter_that_is_unloaded_while_a_request_is_on_its_way_does_not_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where the request comes after the adapter was removed, and has it read again."""
    monkeypatch.setattr(registration, "LATE_GRACE_S", 0.0)

    async def scenario() -> list[int]:
        engine, kept, gone = followed(Engine()), lora_of("kept", 7), lora_of("gone", 8)
        models = SimpleNamespace(
            engine_client=engine, lora_requests={"kept": kept, "again": lora_of("again", 10)}
        )
        registration.start(models)
        for number, lora in enumerate((None, kept, gone, lora_of("again", 9))):
            add(engine, str(number), lora)
        for _ in range(4):
            await asyncio.sleep(0)
        return engine.removed

    assert asyncio.run(scenario()) == [8, 9]


def test_an_answer_does_not_go_on_with_an_adapter_that_was_removed_while_a_tool_was_called() -> (
    None
):
    """The request after the tool's answer would bring it back, with other weights perhaps."""
    engine, acme = followed(Engine()), lora_of("acme", 7)
    models: Any = SimpleNamespace(engine_client=engine, lora_requests={"acme": acme})
    registered_versions.note(engine, 7, Version("abc", 1.0, "lora"))

    async def scenario() -> None:
        registration.start(models)
        current_call.set(call := HttpCall({}, lora=acme))
        add(engine, "first", acme)
        call.ran = "abc"
        models.lora_requests["acme"] = lora_of("acme", 8)
        add(engine, "second", acme)  # the version before stays for a while
        await registration.remove(models, acme)
        with pytest.raises(GracefulHTTPError, match="'acme' was reloaded or unloaded") as failed:
            add(engine, "third", acme)
        assert failed.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE

    asyncio.run(scenario())
    assert list(engine.output_processor.request_states) == ["first", "second"]
    assert engine.removed == [7]


def lora_of(name: str, number: int) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=f"/adapters/{name}")


def test_routes_remember_few_of_the_blends_that_they_have_led_to() -> None:
    """Every new version of a part makes it another one."""
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._led = set()
    for blend in range(5_000):
        server._note_led(blend)
    assert len(server._led) <= 1_024
    assert 4_999 in server._led


def test_a_blend_that_only_a_client_asks_for_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = blended([(LoRARequest("acme", 1, "/adapters/acme"), 0.5)])
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models = SimpleNamespace(lora_requests={"acme": SimpleNamespace(lora_int_id=1)})
    server._failed, server._led = {}, set()
    monkeypatch.setattr(registration, "in_background", lambda work: work.close())
    server.note_failure(lora, LoadFailure(FailureKind.NO_MEMORY, "too large"))
    assert server._failed == {}


@pytest.mark.parametrize(
    ("made", "is_out"), [(RequestFailure, False), (LoadFailure, True)], ids=["own", "everybody's"]
)
def test_a_blend_is_taken_out_of_the_routes_for_what_fails_everybody_alone(
    made: type[LoadFailure], is_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant may have too many blends in use, or there is no memory for this one."""
    lora = blended([(LoRARequest("acme", 1, "/adapters/acme"), 0.5)])
    server = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models = SimpleNamespace(lora_requests={"acme": SimpleNamespace(lora_int_id=1)})
    server._failed, server._led = {}, {lora.lora_int_id}
    monkeypatch.setattr(registration, "in_background", lambda work: work.close())
    # As it comes from the engine.
    failure = from_stop_reason(to_stop_reason(made(FailureKind.NO_MEMORY, "too large"), lora))
    assert failure is not None
    server.note_failure(lora, failure)
    assert bool(server._failed) is is_out


def test_a_look_that_fails_when_nobody_waits_any_more_is_no_news() -> None:
    """A thousand may end at once, when storage that has hung says that it has failed."""
    reported: list[Any] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.append(context)
        )
        answers, looks = asyncio.Event(), PendingLooks(0.001)

        async def look() -> None:
            await answers.wait()
            raise OSError("stale file handle")

        with pytest.raises(TimeoutError):
            await looks.wait(look)
        answers.set()
        async with asyncio.timeout(20):
            while looks._looks:
                await asyncio.sleep(0)
        gc.collect()
        with pytest.raises(OSError, match="stale"):
            await looks.wait(look)

    asyncio.run(scenario())
    assert not reported


def test_looks_that_storage_never_ends_are_a_thousand_at_most() -> None:
    async def scenario() -> None:
        answers, looks, begun = asyncio.Event(), PendingLooks(0.0), 0

        async def look() -> None:
            nonlocal begun
            begun += 1
            await answers.wait()

        for _ in range(1_030):
            with pytest.raises(TimeoutError):
                await looks.wait(look)
        assert begun == 1_024
        answers.set()
        async with asyncio.timeout(20):
            while looks._looks:
                await asyncio.sleep(0)

    asyncio.run(scenario())
