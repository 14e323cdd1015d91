"""What an engine core knows of blends: few at a time, as sound as their parts, gone with them."""

import time

import msgspec
import pytest
from vllm.lora.request import LoRARequest

from tests.engine.fake_engine import MAX_BLENDS, Engine, lora, pack_info
from tests.engine.test_quarantine import counted, on
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.failures import FailureKind, RequestFailure
from vllm_multilora.integration.blends import blend_of, blended
from vllm_multilora.integration.engine.adapter_status import engine_report
from vllm_multilora.integration.engine.adapters.quarantine import Quarantine
from vllm_multilora.integration.failed_requests import AdapterRefusedError, without_folder
from vllm_multilora.integration.seals import Seal
from vllm_multilora.states import AdapterState

ACME, ZEN = Seal("acme"), Seal("zen")


def blend(weight: float, first: int = 1, second: int = 2):
    return blended([(lora(first), weight), (lora(second), 1.0)])


def serve(engine: Engine, request, pack: int) -> None:
    """A request has come, its blend is in host memory, and it is over."""
    assert engine.adapters.request_load(request) is None
    engine.loaded(pack_info(pack))
    engine.adapters.drop(request.lora_int_id)


def known(engine: Engine) -> set[int]:
    return {entry.number for entry in engine.adapters.known()}


def test_any_number_of_blends_come_by_and_few_are_known(engine):
    requests = [blend(number / 10) for number in range(50)]
    for number, request in enumerate(requests, 1):
        serve(engine, request, number)
        assert len(known(engine)) <= MAX_BLENDS
    # Those before were forgotten, here and in the store.
    assert known(engine) == {request.lora_int_id for request in requests[-MAX_BLENDS:]}
    assert engine.store.forgotten == [request.lora_int_id for request in requests[:-MAX_BLENDS]]


def test_the_one_longest_not_asked_for_is_forgotten(engine):
    one, two, three, four = (blend(number / 10) for number in range(4))
    for number, request in enumerate((one, two, three), 1):
        serve(engine, request, number)
    serve(engine, one, 1)
    serve(engine, four, 4)
    assert known(engine) == {request.lora_int_id for request in (one, three, four)}


def test_one_too_many_in_use_fails_alone_and_for_now(engine):
    requests = [blend(number / 10) for number in range(MAX_BLENDS)]
    for request in requests:
        assert engine.adapters.request_load(request) is None
    late = blend(7.0)
    failure = engine.adapters.request_load(late)
    assert isinstance(failure, RequestFailure)
    assert failure.kind is FailureKind.NO_MEMORY
    assert "the limit of blends in use at a time (3, " in failure.message
    assert engine.adapters.request_load(requests[0]) is None  # known ones are asked for as ever
    assert engine.adapters.request_load(lora(9)) is None
    engine.adapters.drop(requests[1].lora_int_id)
    assert engine.adapters.request_load(late) is None
    assert requests[1].lora_int_id not in known(engine)


def test_a_blend_that_is_being_registered_makes_room_for_none(engine):
    requests = [blend(number / 10) for number in range(MAX_BLENDS)]
    futures = [engine.adapters.register(request) for request in requests]
    assert engine.adapters.request_load(blend(7.0)) is not None
    assert isinstance(engine.adapters.register(blend(7.0)).exception(0), AdapterRefusedError)
    assert not any(future.done() for future in futures)


def test_each_tenant_has_its_own(engine):
    for number in range(MAX_BLENDS):
        assert engine.adapters.request_load(blend(number / 10), ACME) is None
    assert engine.adapters.request_load(blend(7.0), ACME) is not None
    assert engine.adapters.request_load(blend(7.0), ZEN) is None
    assert engine.adapters.request_load(blend(8.0)) is None


def test_who_uses_a_tenants_blends_too_keeps_it_from_no_others(engines):
    """Who may use the same adapters sees which blends of them there are."""
    engine = engines()
    requests = [blend(number / 10) for number in range(MAX_BLENDS)]
    for request in requests:
        assert engine.adapters.request_load(request, ACME) is None
        assert engine.adapters.request_load(request, ZEN) is None
    assert engine.adapters.request_load(blend(7.0), ACME) is None
    assert engine.adapters.request_load(blend(8.0), ZEN) is None
    assert known(engine) >= {request.lora_int_id for request in requests}


def test_two_tenants_that_use_each_others_blends_have_no_more_than_two(engine):
    served = 0
    for number in range(4 * MAX_BLENDS):
        request = blend(number / 10)
        if engine.adapters.request_load(request, ACME if number % 2 else ZEN) is None:
            served += 1
            for tenant in (ACME, ZEN):
                assert engine.adapters.request_load(request, tenant) is None
    assert served == len(known(engine)) == 2 * MAX_BLENDS


def test_a_blend_is_reported_by_its_parts_and_has_no_folder(engines):
    engine, request = engines(), blend(0.5)
    engine.adapters.request_load(request)
    engine.store.failed()
    (failed,) = engine.store.inbox
    engine.store.inbox[:] = [
        msgspec.structs.replace(failed, message=f"{request.lora_path}: no room")
    ]
    engine.poll()
    (row,) = engine_report(engine.adapters, {}, [])["adapters"]
    assert row["parts"] == {"adapter 1": 0.5, "adapter 2": 1.0}
    assert row["path"] is None
    assert row["state"] == "failed"
    assert request.lora_path not in row["last_error"]


def test_blends_can_be_switched_off(engines):
    failure = engines(most_blends=0).adapters.request_load(blend(0.5))
    assert failure.kind is FailureKind.INVALID
    assert "--multilora-max-blends 0" in failure.message


def test_without_tenants_all_blends_take_one_turn_of_the_queue(engine):
    for number in range(2):
        engine.adapters.request_load(blend(number / 10))
    engine.adapters.request_load(blend(7.0), ACME)
    first, second, tenants = engine.store.load_requests.values()
    assert first.owners == second.owners != ()
    assert tenants.owners == ("acme",)
    assert first.most is None


def test_a_blend_is_made_anew_once_its_quarantined_part_has_other_weights(engines):
    engine, request = engines(), blend(0.5)
    engine.host(1, digest="bad")
    engine.adapters.request_load(request)
    engine.loaded(msgspec.structs.replace(pack_info(2), parts=("bad", "good")))
    engine.adapters.take_quarantined(counted(r=1), {"r": on("bad", lora(1))})
    assert engine.adapters.state(request.lora_int_id) is AdapterState.QUARANTINED
    engine.adapters.register(lora(1, inplace=True))
    engine.loaded(pack_info(3, "repaired"))
    engine.adapters.request_load(request)
    assert engine.adapters.failure(request.lora_int_id) is None
    engine.loaded(msgspec.structs.replace(pack_info(4), parts=("repaired", "good")))
    assert engine.adapters.is_ready(request.lora_int_id)


def test_blends_that_overflow_put_no_adapter_out_of_mind(monkeypatch):
    """Anybody can think of weights that do, as many as they like."""
    monkeypatch.setattr("vllm_multilora.integration.engine.adapters.quarantine._MAX_REMEMBERED", 4)
    quarantine = Quarantine()
    bad = pack_info(1, "bad")
    quarantine.look(counted(r=1), {"r": on("bad", lora(2))}, lambda number: bad)
    for number in range(10):
        pack = msgspec.structs.replace(pack_info(2, f"blend {number}"), parts=("good",))
        requests = {"r": on(pack.digest, blend(number))}
        quarantine.look(counted(r=1), requests, lambda number, pack=pack: pack)
        assert quarantine.failure(pack) is not None
    assert quarantine.failure(bad) is not None
    assert quarantine.failure(msgspec.structs.replace(pack, digest="other")) is None
    remembered = [
        quarantine.failure(msgspec.structs.replace(pack, digest=f"blend {number}")) is not None
        for number in range(10)
    ]
    assert remembered == [False] * 6 + [True] * 4, "no more than there is memory for"


def test_a_blend_of_a_quarantined_part_is_served_again_with_the_part():
    quarantine = Quarantine()
    bad = pack_info(1, "bad")
    pack = msgspec.structs.replace(pack_info(2, "blend"), parts=("bad", "good"))
    quarantine.look(counted(r=1), {"r": on("bad", lora(2))}, lambda number: bad)
    quarantine.look(counted(r=1), {"r": on("blend", blend(0.5))}, lambda number: pack)
    assert quarantine.failure(pack) is not None
    quarantine.lift(bad)
    assert quarantine.failure(pack) is None


def test_parts_must_have_the_digests_that_are_required(engines):
    class Required:
        def refuse(self, name: str, digest: str) -> Problem | None:
            if digest == f"{name}'s":
                return None
            return Problem.at(Code.WRONG_DIGEST, name, "digest", digest, f"{name}'s")

    engine = engines(required=Required())
    for number, (digests, refusal) in enumerate(
        [
            (("adapter 1's", "adapter 2's"), None),
            (("adapter 1's", "other"), "adapter 2: digest is other, expected adapter 2's"),
        ]
    ):
        request = blend(number / 10)
        engine.adapters.request_load(request)
        engine.loaded(msgspec.structs.replace(pack_info(number + 1), parts=digests))
        failure = engine.adapters.failure(request.lora_int_id)
        assert (failure and failure.message) == refusal


def test_the_blends_of_an_adapter_are_found_however_many_others_there_are():
    """The look-up happens for each adapter that is loaded for the first time."""

    def seconds(others: int) -> float:
        known = Engine(most_blends=others + 1).adapters.known()
        for number in range(others):
            known.known_for(blend(0.5, number + 10, number + 11))
        asked = known.known_for(blend(0.5))

        def look() -> float:
            begun = time.perf_counter()
            assert known.blends_with(1) == [asked]
            return time.perf_counter() - begun

        return min(look() for _ in range(20))

    assert seconds(5_000) < 20 * seconds(5)


def test_an_adapter_may_be_a_part_twice_under_two_names(engine):
    twice = [(LoRARequest(name, 1, "/adapters/1"), 0.5) for name in ("a", "b")]
    request = blended(twice)
    engine.adapters.register(request)
    assert engine.adapters.blends_with(1) == [request.lora_int_id]
    engine.adapters.remove(request.lora_int_id)
    assert engine.adapters.blends_with(1) == []


def blended_pack(pack: int, *parts: str):
    return msgspec.structs.replace(pack_info(pack, f"blend of {parts}"), parts=parts)


def change_part(engine: Engine, number: int, pack: int, digest: str) -> None:
    """An adapter is reloaded in place, and has these weights."""
    engine.adapters.request_load(lora(number, inplace=True))
    (load_request,) = (
        each for each in engine.store.load_requests.values() if each.adapter == number
    )
    engine.loaded(pack_info(pack, digest), load_request)


def test_the_next_request_after_a_reload_of_a_part_is_for_a_new_blend(engines):
    engine = engines(slots=3)
    request, other = blend(0.5), blend(0.5, 2, 3)
    for pack, each in enumerate((request, other), 10):
        engine.adapters.request_load(each)
        engine.loaded(blended_pack(pack, "one", "two"))
    number = request.lora_int_id
    assert engine.adapters.is_ready(number)
    change_part(engine, 1, 20, "one")
    assert engine.adapters.is_ready(number)
    change_part(engine, 1, 21, "new")
    engine.adapters.request_load(request)
    assert not engine.adapters.is_ready(number)
    assert engine.store.only().fresh
    engine.loaded(blended_pack(12, "new", "two"))
    assert engine.adapters.is_ready(number)
    assert engine.adapters.version(number).parts == ("new", "two")
    assert engine.adapters.is_ready(other.lora_int_id)


def test_a_blend_is_made_anew_where_its_part_is_first_read_later_and_has_other_weights(engines):
    engine, request = engines(), blend(0.5)
    engine.adapters.request_load(request)
    engine.loaded(blended_pack(10, "one", "two"))
    change_part(engine, 1, 20, "new")
    assert not engine.adapters.is_ready(request.lora_int_id)
    assert engine.store.only().fresh


def test_a_blend_that_is_made_while_a_part_is_reloaded_is_made_again(engine):
    change_part(engine, 1, 20, "one")
    request = blend(0.5)
    engine.adapters.request_load(request)
    assert not engine.store.only().fresh
    change_part(engine, 1, 21, "new")
    assert engine.store.only().fresh
    engine.loaded(blended_pack(12, "new", "two"))
    assert engine.adapters.is_ready(request.lora_int_id)


def test_a_blend_that_is_checked_while_a_part_is_reloaded_is_checked_again(engine):
    change_part(engine, 1, 20, "one")
    engine.adapters.register(blend(0.5))
    tickets = engine.store.tickets
    change_part(engine, 1, 21, "new")
    assert engine.store.tickets == tickets + 2  # the part's, and the blend's once more
    assert engine.store.only().fresh


def test_a_blend_that_workers_check_while_a_part_is_reloaded_is_checked_again(engine):
    change_part(engine, 1, 20, "one")
    request = blend(0.5)
    future = engine.adapters.register(request)
    made = msgspec.structs.replace(blended_pack(12, "one", "two"), has_special=True)
    engine.loaded(made)
    order = engine.workers.only()
    change_part(engine, 1, 21, "new")
    engine.filled(order)
    assert not future.done()
    assert engine.adapters.version(request.lora_int_id) is None
    engine.loaded(blended_pack(13, "new", "two"))
    assert future.result()


@pytest.mark.parametrize("is_made", [True, False])
def test_what_becomes_of_a_blend_after_its_parts_new_weights_in_one_poll_is_no_matter(
    engines, is_made
):
    engine = engines()
    engine.host(1, digest="one")
    request = blend(0.5)
    engine.adapters.request_load(request)
    made = engine.store.only()
    engine.adapters.request_load(lora(1, inplace=True))
    (reload,) = (
        load_request
        for load_request in engine.store.load_requests.values()
        if load_request.adapter == 1
    )
    engine.store.loaded(pack_info(20, "new"), reload)
    if is_made:
        engine.store.loaded(blended_pack(12, "one", "two"), made)
    else:
        engine.store.failed(made)
    engine.poll()
    assert engine.store.only().fresh  # it is made again
    assert engine.adapters.failure(request.lora_int_id) is None
    assert engine.store.leased == {20: 1}


def test_a_blend_and_its_part_that_come_together_are_read_once(engine):
    engine.adapters.request_load(blend(0.5))
    change_part(engine, 1, 20, "one")
    assert not engine.store.only().fresh


def test_messages_name_parts_and_no_folders():
    request = blend(0.5)
    text = "/adapters/1/adapter_config.json: 'r' is 0; /adapters/2: bad; /adapters/22"
    assert without_folder(text, request) == (
        "adapter 1/adapter_config.json: 'r' is 0; adapter 2: bad; /adapters/22"
    )


def test_blends_of_blends_are_refused():
    with pytest.raises(ValueError, match="as a part"):
        blended([(blend(0.5), 1.0)])
    assert blend_of(blend(0.5)).name == "0.5*adapter 1+1*adapter 2"
