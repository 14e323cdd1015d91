"""Numbers that are not finite are their adapter's fault, unless the base model makes them too."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.request import RequestStatus

from tests.engine.executors import SchedulerStub, StartedExecutor
from tests.engine.fake_engine import Engine, lora, pack_info
from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.failures import FailureKind
from vllm_multilora.integration.engine.adapters.quarantine import Quarantine
from vllm_multilora.integration.engine.requests.prefix_keys import VERSION
from vllm_multilora.states import AdapterState

ACME = SimpleNamespace(lora_int_id=7, lora_name="acme", lora_path="/adapters/acme")
PACK = SimpleNamespace(digest="d1", parts=())


def on(digest: str | None, lora: SimpleNamespace | None = ACME, **own) -> SimpleNamespace:
    """A request that runs on these weights."""
    numbers = {"prompt_embeds": None, "mm_features": []} | own
    request = SimpleNamespace(lora_request=lora, **numbers)
    if digest is not None:
        VERSION.set(request, digest)
    return request


REQUESTS = {"acme's": on("d1"), "base's": on(None, None)}


def counted(**counts: int) -> SimpleNamespace:
    names = {name.replace("_", "'"): count for name, count in counts.items()}
    return SimpleNamespace(req_ids=list(names), num_nans_in_logits=names, pooler_output=None)


def pooled(*results: torch.Tensor | None) -> SimpleNamespace:
    return SimpleNamespace(
        req_ids=["acme's", "base's"][: len(results)],
        num_nans_in_logits=None,
        pooler_output=list(results),
    )


def quarantined() -> Engine:
    """An engine in whose slot the weights of adapter 7 have computed NaN."""
    engine = Engine()
    engine.fill(7, 10, digest="d1")
    engine.idle()
    engine.adapters.take_quarantined(counted(acme_s=3), REQUESTS)
    return engine


@pytest.mark.parametrize(
    "output",
    [
        counted(acme_s=3, base_s=0),
        pooled(torch.tensor([1.0, float("nan")]), torch.ones(2)),
        pooled(torch.tensor([float("inf")]), None),
    ],
    ids=["logits", "pooled-nan", "pooled-infinity"],
)
def test_the_adapter_of_the_request_is_quarantined(output):
    quarantine = Quarantine()
    found = quarantine.look(output, REQUESTS, lambda number: PACK)
    assert found.keys() == {7}
    assert quarantine.failure(PACK) == found[7]
    assert found[7].kind is FailureKind.QUARANTINED
    assert quarantine.failure(SimpleNamespace(digest="d2", parts=())) is None
    quarantine.lift(PACK)
    assert quarantine.failure(PACK) is None


def test_weights_that_ran_are_quarantined_though_newer_ones_are_already():
    quarantine, newer = Quarantine(), SimpleNamespace(digest="d2", parts=())
    quarantine.look(counted(acme_s=1), {"acme's": on("d2")}, lambda number: newer)
    quarantine.look(counted(acme_s=1), REQUESTS, lambda number: newer)
    assert quarantine.failure(PACK) is not None


def test_the_version_that_ran_is_quarantined():
    """A repaired one may be there already, and wait for the requests of the one before to end."""
    quarantine = Quarantine()
    repaired = SimpleNamespace(digest="d2", parts=())
    assert quarantine.look(counted(acme_s=3), REQUESTS, lambda number: repaired).keys() == {7}
    assert quarantine.failure(repaired) is None
    assert quarantine.failure(PACK) is not None


@pytest.mark.parametrize("is_good", [True, False], ids=["succeeds", "fails"])
def test_a_registration_of_the_same_weights_lifts_it_if_it_succeeds(is_good):
    engine = quarantined()
    assert engine.adapters.state(7) is AdapterState.QUARANTINED
    future = engine.adapters.register(lora(7, inplace=True))
    if is_good:
        engine.store.loaded(pack_info(11, "d1"))
    else:
        engine.store.failed()
    engine.poll()
    assert (future.exception(0) is None) == is_good
    expected = AdapterState.SLOT if is_good else AdapterState.QUARANTINED
    assert engine.adapters.state(7) is expected


@pytest.mark.parametrize(
    ("number", "lifts"),
    [
        pytest.param(7, False, id="tried again by a route, or by another API server"),
        pytest.param(FIRST_NUMBER + 7, False, id="of a directory, which requests bring about"),
        pytest.param(8, True, id="anew"),
    ],
)
def test_only_who_registers_the_same_weights_anew_lifts_it(number, lifts):
    engine = quarantined()
    future = engine.adapters.register(lora(number))
    for load_request in list(engine.store.load_requests.values()):
        engine.store.loaded(pack_info(10, "d1"), load_request)
    engine.poll()
    assert future.result(0)
    assert (engine.adapters.state(7) is AdapterState.QUARANTINED) != lifts


def test_a_registration_of_other_weights_lifts_nothing_where_there_is_no_room_for_them():
    """The adapter's last ones are another one's, too."""
    engine = Engine()
    engine.fill(7, 10, digest="d1")
    engine.host(8, 10, digest="d1")
    engine.adapters.take_quarantined(counted(acme_s=3), REQUESTS)
    future = engine.adapters.register(lora(7, inplace=True))
    engine.loaded(pack_info(0, "d2"))
    assert future.result(0)
    assert engine.adapters.state(7) is AdapterState.ABSENT
    assert engine.adapters.state(8) is AdapterState.QUARANTINED


@pytest.mark.parametrize("digest", ["d1", "d2"])
def test_a_reload_that_a_request_asks_for_may_bring_sound_weights(digest):
    engine = quarantined()
    assert engine.adapters.request_load(lora(7, inplace=True)) is None
    assert not engine.adapters.is_ready(7, reload=True)
    assert engine.adapters.failure(7, reload=True) is None
    assert engine.adapters.state(7) is AdapterState.QUEUED
    engine.loaded(pack_info(11, digest))
    is_sound = digest != "d1"
    assert engine.adapters.is_ready(7, reload=True) == is_sound
    expected = AdapterState.HOST if is_sound else AdapterState.QUARANTINED
    assert engine.adapters.state(7) is expected


@pytest.mark.parametrize(
    "output",
    [counted(acme_s=0), counted(gone_s=5), pooled(torch.zeros(3), torch.ones(3)), pooled()],
    ids=["finite", "request-has-ended", "pooled", "nothing"],
)
def test_sound_steps_quarantine_nobody(output):
    assert Quarantine().look(output, REQUESTS, lambda number: PACK) == {}


def test_nobody_is_quarantined_for_what_the_base_model_makes(caplog):
    quarantine = Quarantine()
    assert quarantine.look(counted(acme_s=3, base_s=1), REQUESTS, lambda number: PACK) == {}
    assert quarantine.look(counted(acme_s=3), REQUESTS, lambda number: PACK) == {}
    assert sum("base model itself" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("method", "is_looked_at"),
    [
        ("reload_weights", True),
        ("finish_weight_update", True),
        ("compute_weight_checksums", False),
        (len, False),
    ],
)
def test_the_base_model_is_looked_at_anew_when_its_weights_were_loaded_again(method, is_looked_at):
    engine = Engine()
    executor = StartedExecutor(SchedulerStub(engine.adapters), None)
    quarantine = engine.adapters.quarantine
    quarantine.look(counted(base_s=1), REQUESTS, lambda number: PACK)
    assert executor.collective_rpc(method) == [None]
    assert executor.called == [method]
    found = quarantine.look(counted(acme_s=1), REQUESTS, lambda number: PACK)
    assert found.keys() == ({7} if is_looked_at else set())


@pytest.mark.parametrize("begun", [{"status": RequestStatus.RUNNING}, {"num_computed_tokens": 9}])
def test_what_began_with_the_base_models_last_weights_says_nothing_of_those_after_them(begun):
    """A step may be under way, and what is cached of a prompt is of those before."""
    quarantine = Quarantine()
    quarantine.look(counted(base_s=1), REQUESTS, lambda number: PACK)
    waiting = {"status": RequestStatus.WAITING, "num_computed_tokens": 0, "is_finished": bool}
    requests = {
        name: on("d1" if lora else None, lora, **(waiting | of))
        for name, lora, of in (("acme's", ACME, begun), ("base's", None, begun), ("new", ACME, {}))
    }
    quarantine.base_reloaded(requests)
    assert quarantine.look(counted(acme_s=1, base_s=1), requests, lambda number: PACK) == {}
    assert quarantine.look(counted(new=1), requests, lambda number: PACK).keys() == {7}
    quarantine.lift(PACK)
    del requests["acme's"]
    quarantine.look(counted(), requests, lambda number: PACK)
    requests["acme's"] = on("d1")  # of the same name
    assert quarantine.look(counted(acme_s=1), requests, lambda number: PACK).keys() == {7}


@pytest.mark.parametrize("own", [{"prompt_embeds": torch.ones(2)}, {"mm_features": ["an image"]}])
@pytest.mark.parametrize("lora", [ACME, None], ids=["adapter", "base"])
def test_what_a_client_has_computed_puts_nobody_out_and_clears_nobody(own, lora):
    """A client that sends NaN in embeddings could otherwise do either to others' adapters."""
    quarantine = Quarantine()
    brought = {"brought": on("d1", lora, **own)}
    output = SimpleNamespace(
        req_ids=["brought"], num_nans_in_logits={"brought": 9}, pooler_output=None
    )
    assert quarantine.look(output, brought, lambda number: PACK) == {}
    assert quarantine.look(counted(acme_s=1), REQUESTS, lambda number: PACK).keys() == {7}
