"""What an API server keeps of, and does for, clients that ask again and again."""

import asyncio
import gc
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from tests.event_loop import in_event_loop
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
from vllm_multilora.integration.server.requests import engine_admission, http_calls, own_templates
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
@in_event_loop
async def test_the_engine_is_asked_for_a_listing_once_a_second_whoever_asks(cost_s: float) -> None:
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


@in_event_loop
async def test_what_somebody_sees_of_a_listing_is_in_what_it_costs() -> None:
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


@in_event_loop
async def test_a_listing_that_could_not_be_had_is_asked_for_again() -> None:
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
        models = models_of()
        engine = models.engine_client
        with monkeypatch.context() as patch:
            for module, name in ((os, "stat"), (os, "open"), (os.path, "realpath")):
                patch.setattr(module, name, touch)
            answer = await registration.load_adapter(models, LOAD)
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


def test_no_swap_in_flight_where_adapters_may_bring_templates() -> None:
    """A template is known by its adapter's number, which such a swap leaves as it is."""
    models, templates = models_of(acme=ACME), own_templates.OWN_TEMPLATES
    models.engine_client.vllm_config = VllmConfig()
    templates.set(
        models.engine_client, own_templates.OwnTemplates.__new__(own_templates.OwnTemplates)
    )
    refusal: Any = asyncio.run(registration.load_adapter(models, IN_FLIGHT))
    assert refusal.error.code == HTTPStatus.BAD_REQUEST
    assert "may bring a chat template" in refusal.error.message
    assert models.engine_client.asked == []


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


@in_event_loop
async def test_an_answer_does_not_go_on_with_an_adapter_that_its_tool_call_outlived() -> None:
    """The request after the tool's answer would bring it back, with other weights perhaps."""
    engine, acme = followed(Engine()), lora_of("acme", 7)
    models: Any = SimpleNamespace(engine_client=engine, lora_requests={"acme": acme})
    registered_versions.note(engine, 7, Version("abc", 1.0, "lora"))
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
    assert list(engine.output_processor.request_states) == ["first", "second"]
    assert engine.removed == [7]


def lora_of(name: str, number: int) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=f"/adapters/{name}")


@in_event_loop
async def test_a_look_that_fails_when_nobody_waits_any_more_is_no_news() -> None:
    """A thousand may end at once, when storage that has hung says that it has failed."""
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    answers, looks = threading.Event(), PendingLooks(ThreadPoolExecutor(1), 0.001)

    def look() -> None:
        answers.wait()
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
    assert not reported


def test_a_name_that_no_adapter_has_is_not_searched_for_a_version() -> None:
    """Nobody is answered meanwhile: ten million characters take a second."""
    longest, begun = "x" * 255, time.thread_time()
    for name, taken in (
        (f"{longest}@{'0' * 64}", "0" * 64),
        (f"{longest}x@{'0' * 64}", ""),
        ("@" * 30_000_000, ""),
    ):
        found = http_calls.split(name, (), is_name=lambda name: False)
        assert found == (longest if taken else name, taken)
    assert time.thread_time() - begun < 0.5


@pytest.mark.parametrize("change", ["load", "unload"])
@in_event_loop
async def test_a_change_that_is_given_up_is_made_whole(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """By a middleware with a time limit, say: the engine makes it all the same."""
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    is_asked, may_go = asyncio.Event(), asyncio.Event()

    async def wait(*_: Any) -> None:
        is_asked.set()
        await asyncio.wait_for(may_go.wait(), 10)

    async def nothing(*_: Any) -> None: ...

    monkeypatch.setattr(Engine, "register", wait)
    if change == "unload":
        monkeypatch.setattr(shared_names, "retract", wait)
        monkeypatch.setattr(registration, "remove_later", nothing)
    models = models_of(**({} if change == "load" else {"acme": ACME}))
    call = asyncio.create_task(getattr(registration, change)(models, LOAD))
    await asyncio.wait_for(is_asked.wait(), 10)
    call.cancel()
    await asyncio.wait({call}, timeout=10)
    assert call.cancelled()
    may_go.set()
    await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)
    if change == "load":
        assert models.lora_requests["acme"].lora_int_id == 1
    else:
        assert models.engine_client.removed == [1]


ACME = lora_of("acme", 1)
LOAD: Any = SimpleNamespace(
    lora_name="acme",
    lora_path="/acme",
    load_inplace=False,
    is_3d_lora_weight=False,
    swap=None,
    expected_version=None,
)
IN_FLIGHT: Any = SimpleNamespace(**vars(LOAD) | {"load_inplace": True, "swap": "in_flight"})
GONE = LoadFailure(FailureKind.GONE, "gone")
BLEND = blended([(LoRARequest("acme", 1, "/adapters/acme"), 0.5)])


def models_of(**loras: Any) -> Any:
    return SimpleNamespace(
        engine_client=Engine(),
        lora_requests=loras,
        lora_id_counter=AtomicCounter(0),
        is_base_model="base".__eq__,
    )


def routes_of(models: Any, failed: Any = (), led: Any = ()) -> Any:
    """Routes without a file, some of whose adapters have failed."""
    server: Any = routes.ServerRoutes.__new__(routes.ServerRoutes)
    server._models, server._failed, server._led = models, dict(failed), set(led)
    return server


def pauses(monkeypatch: pytest.MonkeyPatch, during: Any = lambda slept: None) -> list[float]:
    """The pauses between tries, which take no time."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        during(slept)

    monkeypatch.setattr(routes, "asyncio", SimpleNamespace(sleep=sleep))
    return slept


def test_routes_try_a_failed_adapter_again_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept, server = pauses(monkeypatch), routes_of(models_of(acme=ACME), {1: GONE})

    async def admit(models: Any, lora: Any) -> Any:
        return None if len(slept) == 8 else ANSWER

    monkeypatch.setattr(registration, "admit", admit)
    asyncio.run(server._try_again(ACME))
    assert slept == [5, 10, 20, 40, 60, 60, 60, 60]
    assert server._failed == {}


@in_event_loop
async def test_routes_lead_to_no_quarantined_adapter_before_it_has_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def during(slept: list[float]) -> None:
        if len(slept) == 1:  # the load that failed has been made up for, and what it brought is bad
            server.note_failure(ACME, LoadFailure(FailureKind.QUARANTINED, "not finite"))
        if len(slept) == 7:
            models.lora_requests["acme"] = lora_of("acme", 2)  # other weights
        assert server._failed[1].kind is FailureKind.QUARANTINED

    models = models_of(acme=ACME)
    slept, server = pauses(monkeypatch, during), routes_of(models)

    async def remove_later(models: Any, lora: Any) -> None: ...

    monkeypatch.setattr(registration, "admit", None)  # the engine has it, and serves it to nobody
    monkeypatch.setattr(registration, "remove_later", remove_later)
    server.note_failure(ACME, GONE)
    await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)
    assert slept == [5, 10, 20, 40, 60, 60, 60]
    assert server._failed == {}


@pytest.mark.parametrize("moment", ["while it waits", "while it reads"])
@in_event_loop
async def test_routes_bring_no_adapter_back_that_was_unloaded(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    models, held = models_of(acme=ACME), set[int]()
    server = routes_of(models, {1: GONE})

    def unload_if(now: str) -> None:
        if moment == now:
            del models.lora_requests["acme"]
            held.discard(1)

    async def admit(models: Any, lora: Any) -> Any:
        unload_if("while it reads")
        held.add(lora.lora_int_id)

    async def remove(models: Any, lora: Any) -> None:
        held.discard(lora.lora_int_id)

    pauses(monkeypatch, lambda _: unload_if("while it waits"))
    monkeypatch.setattr(registration, "admit", admit)
    monkeypatch.setattr(registration, "remove", remove)
    monkeypatch.setattr(registration.remove_later, "__defaults__", (0.0,))
    await server._try_again(ACME)
    if moment == "while it waits":
        assert held == set()  # nothing was read at all
    await asyncio.wait_for(asyncio.gather(*registration._tasks), 10)
    assert held == set()
    assert server._failed == {}


@pytest.mark.parametrize(
    ("lora", "led", "failure", "is_out"),
    [
        (ACME, (), RequestFailure(FailureKind.INVALID, "no invocation"), False),
        (BLEND, (), LoadFailure(FailureKind.NO_MEMORY, "too large"), False),
        (BLEND, (BLEND.lora_int_id,), RequestFailure(FailureKind.NO_MEMORY, "too large"), False),
        (BLEND, (BLEND.lora_int_id,), LoadFailure(FailureKind.NO_MEMORY, "too large"), True),
    ],
    ids=["a prompt's", "a blend of a client's", "a tenant's", "everybody's"],
)
def test_routes_lead_on_unless_what_failed_fails_everybody(
    lora: Any, led: Any, failure: LoadFailure, is_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant may have too many blends in use, or there is no memory for this one."""
    monkeypatch.setattr(registration, "in_background", lambda work: work.close())
    server = routes_of(models_of(acme=ACME), led=led)
    received = from_stop_reason(to_stop_reason(failure, lora))  # as it comes from the engine
    assert received is not None
    server.note_failure(lora, received)
    assert bool(server._failed) is is_out


def test_routes_remember_few_of_the_blends_that_they_have_led_to() -> None:
    """Every new version of a part makes it another one."""
    server = routes_of(models_of())
    for blend in range(5_000):
        server._note_led(blend)
    assert len(server._led) <= 1_024
    assert 4_999 in server._led
