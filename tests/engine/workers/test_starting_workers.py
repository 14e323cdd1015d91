"""What an engine core has ready while its workers start: their link, and the store."""

import multiprocessing
from types import SimpleNamespace

import pytest
from vllm.config import LoRAConfig, VllmConfig

from tests.serving.stores import await_end, store_process
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.engine import core
from vllm_multilora.integration.engine.core import EARLY_STORE
from vllm_multilora.integration.engine.scheduling.scheduler import AdapterAwareMixin
from vllm_multilora.integration.recording import server_of
from vllm_multilora.integration.worker_link.fill_link import LINK, attach_worker
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol import store_folder

pytestmark = pytest.mark.waits

LIMIT_S = 10.0


def executor_of_ours():
    """An executor with one worker, which has our manager."""
    return SimpleNamespace(collective_rpc=lambda call, args=(): [True])


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the store of this test's engines is."""
    (tmp_path / "store").mkdir(mode=0o700)
    monkeypatch.setenv(store_folder.FOLDER_VARIABLE, str(tmp_path / "store"))
    monkeypatch.setattr(core, "loads_adapters", lambda config: True)
    monkeypatch.setattr(core, "settings_of", lambda config: MultiLoRAConfig())
    return store_folder.socket_path(store_folder.store_folder())


def test_the_store_is_up_before_the_workers_and_goes_with_those_that_fail(path):
    executor = SimpleNamespace()
    stores = []

    def start():
        with core.starting_workers(executor, VllmConfig()):
            stores.append(store_process(path))
            assert EARLY_STORE.get(executor).address == f"unix:{path}"
            raise MemoryError("of a worker")

    with pytest.raises(MemoryError, match="of a worker"):
        start()
    assert (LINK.get(executor), EARLY_STORE.get(executor)) == (None, None)
    await_end(stores[0], LIMIT_S)


def test_no_connection_is_left_where_workers_are_not_heard(path, monkeypatch):
    monkeypatch.setattr(core, "reach", lambda *arguments: None)
    executor, stores = executor_of_ours(), []

    def start():
        with core.starting_workers(executor, VllmConfig()):
            stores.append(store_process(path))

    with pytest.raises(MultiLoRAError, match=r"workers 0, .* do not reach"):
        start()
    store = stores[0]
    assert (LINK.get(executor), EARLY_STORE.get(executor)) == (None, None)
    await_end(store, LIMIT_S)


def test_nobody_looks_elsewhere_for_workers_whose_adapters_others_load(path, monkeypatch):
    monkeypatch.setattr(core, "reach", lambda *arguments: pytest.fail("looked for"))
    executor = SimpleNamespace(collective_rpc=lambda call, args=(): [False])
    with core.starting_workers(executor, VllmConfig()):
        pass
    assert (LINK.get(executor), EARLY_STORE.get(executor)) == (None, None)


def test_workers_that_are_forked_have_no_connection_of_their_engine_cores(path, monkeypatch):
    """Nobody reads there any more, and what the store says to it would lie in its memory."""
    monkeypatch.setattr(core, "reach", lambda *arguments: None)
    forked = multiprocessing.get_context("fork")
    is_over = forked.Event()
    worker = forked.Process(target=is_over.wait, args=(6 * LIMIT_S,), daemon=True)
    stores = []

    def start():
        with core.starting_workers(executor_of_ours(), VllmConfig()):
            stores.append(store_process(path))
            worker.start()

    try:
        with pytest.raises(MultiLoRAError, match="do not reach"):
            start()
        await_end(stores[0], LIMIT_S)
        assert worker.is_alive()
    finally:
        is_over.set()
        worker.join(LIMIT_S)


def test_a_store_that_cannot_start_learns_where_it_is_needed(path, monkeypatch):
    path.parent.chmod(0o777)
    executor = executor_of_ours()
    with core.starting_workers(executor, VllmConfig()):
        assert EARLY_STORE.get(executor) is None
    with pytest.raises(store_folder.StoreUnavailableError, match="store"):
        StoreClient.connect("process", "server")


def test_all_engines_of_a_server_tell_its_stores_the_same_name(path, monkeypatch):
    """Though vLLM renames the instance of each when it has made it."""
    monkeypatch.setattr(core, "_make_link", lambda config: None)
    opened = []
    monkeypatch.setattr(core, "_open_stores", lambda *arguments: opened.append(arguments[-1]))
    config = VllmConfig()
    executor = SimpleNamespace(collective_rpc=lambda call, args=(): None, vllm_config=config)
    server = server_of(config)
    with core.starting_workers(executor, config):
        pass
    config.__post_init__()
    assert server_of(config) != server
    with pytest.raises(store_folder.StoreUnavailableError, match="cannot answer"):
        core._connect(executor, SimpleNamespace(), None, asks_late=False)
    assert opened == [server]


def test_an_engine_core_that_has_one_of_the_workers_waits_for_that_one(path, monkeypatch):
    """With `external_launcher` (torchrun) each of them has an engine core, which is told of all."""
    store = SimpleNamespace(address="unix:/store")
    monkeypatch.setattr(core, "_connect", lambda *arguments, **_: (store, None))
    config = VllmConfig()
    config.lora_config = LoRAConfig(max_lora_rank=8, max_loras=1)
    config.parallel_config.distributed_executor_backend = "external_launcher"
    config.parallel_config.world_size = 2
    executor = executor_of_ours()
    with core.starting_workers(executor, config):
        assert attach_worker(0) is not None
    link = LINK.get(executor)
    assert link is not None
    scheduler = object.__new__(AdapterAwareMixin)
    scheduler.recorder = scheduler.request_metrics = None
    executor.vllm_config = config
    adapters = core.make_adapters(executor, scheduler, None)
    assert adapters.asks_late
    slots = adapters.slots
    assert slots.filled(slots.assign(1, pack=1).order)
    EARLY_STORE.get(executor).close()
    link.close()
