"""What API servers of one server have in their tables of names, whatever becomes of the store."""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.utils.counter import AtomicCounter

from tests.store.names_only import Stores
from vllm_multilora.adapters.directory import FIRST_NUMBER
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.registered_versions import Version
from vllm_multilora.integration.server.names import registration, shared_names
from vllm_multilora.integration.server.names.shared_names import NAMES, SharedNames
from vllm_multilora.integration.server.requests import http_calls
from vllm_multilora.integration.updating import SERVER_VARIABLE, UPDATING_VARIABLE
from vllm_multilora.store.clients.names_client import NamesClient
from vllm_multilora.store.protocol.store_folder import StoreUnavailableError

PATIENT_S = 20.0


def api_server(stores: Stores) -> Any:
    models = SimpleNamespace(lora_requests={}, engine_client=SimpleNamespace())
    NAMES.set(models, SharedNames(models, NamesClient(stores, "server")))  # type: ignore[arg-type]
    return models


def adapter(number: int, name: str = "acme") -> LoRARequest:
    return LoRARequest(name, number, f"/adapters/{number}")


def note(models: Any, number: int) -> None:
    registered_versions.note(models.engine_client, number, Version(str(number), 0.0, ""))


def served(models: Any) -> dict[str, int]:
    return {name: lora.lora_int_id for name, lora in models.lora_requests.items()}


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENT_S):
        while not is_so():
            await asyncio.sleep(0.001)


def beside_stores(test: Callable[[Stores, pytest.MonkeyPatch], Any]) -> Any:
    """Runs a test beside its stores."""

    async def work(stores: Stores) -> None:
        while True:
            stores.work()
            await asyncio.sleep(0.001)

    async def main(monkeypatch: pytest.MonkeyPatch) -> None:
        stores = Stores()
        working = asyncio.create_task(work(stores))
        await test(stores, monkeypatch)
        working.cancel()

    return lambda monkeypatch: asyncio.run(main(monkeypatch))


@beside_stores
async def test_a_name_given_to_two_adapters_at_once_leads_to_one_and_the_other_is_freed(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = []

    async def remove_later(models: Any, lora: LoRARequest) -> None:
        freed.append(lora.lora_int_id)

    monkeypatch.setattr(registration, "remove_later", remove_later)
    monkeypatch.setattr(http_calls, "GRACE_S", 0.0)
    one, two = api_server(stores), api_server(stores)
    await registration.serve(one, adapter(1))
    await until(lambda: served(two) == {"acme": 1})
    for models, number in ((one, 101), (two, 202)):
        note(models, number)
    both = registration.serve(one, adapter(101)), registration.serve(two, adapter(202))
    await asyncio.gather(*both)
    await asyncio.sleep(0)
    assert served(one) == served(two)
    (number,) = served(one).values()
    assert {1, 101, 202} == {number, *freed}
    assert number not in freed
    await asyncio.sleep(0.01)  # after the time that an old version is known for
    for models in (one, two):
        assert registered_versions.find(models.engine_client, adapter(number)) is not None


@beside_stores
async def test_requests_on_their_way_find_what_was_reloaded_elsewhere_and_not_what_was_unloaded(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = api_server(stores), api_server(stores)

    async def load(number: int) -> None:
        note(one, number)
        await registration.serve(one, adapter(number))
        await until(lambda: served(two) == {"acme": number})

    def is_known(number: int) -> bool:
        return registered_versions.find(two.engine_client, adapter(number)) is not None

    await load(1)
    await load(2)
    assert is_known(1)
    monkeypatch.setattr(http_calls, "GRACE_S", 0.0)
    await load(3)
    await until(lambda: not is_known(2))
    assert is_known(3)
    await shared_names.retract(one, one.lora_requests.pop("acme"))
    await until(lambda: not served(two))
    assert not is_known(3)


@beside_stores
async def test_when_a_change_is_answered_all_api_servers_know_of_it(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_names, "_SETTLE_LIMIT_S", 2 * PATIENT_S)
    one, two = api_server(stores), api_server(stores)
    async with asyncio.timeout(PATIENT_S):
        await registration.serve(one, adapter(1))
        assert served(two) == {"acme": 1}
        await shared_names.retract(one, one.lora_requests.pop("acme"))
        assert not served(two)


@beside_stores
async def test_an_api_server_that_finds_no_store_hears_of_changes_once_there_is_one(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = api_server(stores), api_server(stores)
    stores.is_down = True
    stores.die()
    await until(lambda: stores.attempts >= 6)
    stores.is_down = False
    await registration.serve(one, adapter(101))
    await until(lambda: served(two) == {"acme": 101})


@beside_stores
async def test_a_registration_that_finds_the_store_dead_is_made_at_the_next_one(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = api_server(stores), api_server(stores)
    await registration.serve(one, adapter(101, "first"))
    for number in range(2, 5):
        stores.die()
        await registration.serve(one, adapter(number))
        await until(lambda: served(two) == served(one))


def test_api_servers_have_numbers_of_their_own_for_as_long_as_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each registration takes one; a hundred a second for a hundred days are 0.9 billion."""

    def no_store() -> None:
        raise StoreUnavailableError("none is needed here")

    monkeypatch.setenv(SERVER_VARIABLE, "server")
    monkeypatch.setenv(UPDATING_VARIABLE, "1")
    monkeypatch.setattr(shared_names, "StoreProcess", no_store)

    def first_number(rank: int, count: int) -> int:
        parallel = SimpleNamespace(_api_process_rank=rank, _api_process_count=count)
        client = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=parallel))
        models = SimpleNamespace(engine_client=client, lora_id_counter=AtomicCounter(0))
        shared_names.start(models)
        return models.lora_id_counter.inc(1)

    numbers = [*(first_number(rank, 4) for rank in range(4)), FIRST_NUMBER]
    assert all(last - first > 900_000_000 for first, last in pairwise(numbers))
