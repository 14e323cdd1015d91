"""The executor class that is derived from the one that vLLM's configuration says."""

import multiprocessing
import pickle
from queue import Queue
from types import SimpleNamespace

import pytest
from vllm.config import LoRAConfig, VllmConfig
from vllm.v1.executor import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher, UniProcExecutor

from tests.engine.executors import SchedulerStub, StartedExecutor
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.engine import executor as module
from vllm_multilora.integration.engine.adapters.pushed_folders import PushedFolders
from vllm_multilora.integration.engine.executor import AdapterExecutorMixin, adapter_loading
from vllm_multilora.states import AdapterState


class OwnExecutor(UniProcExecutor):
    """A user's own executor class."""


def config(backend, *, lora: bool = True) -> VllmConfig:
    made = VllmConfig()
    made.parallel_config.distributed_executor_backend = backend
    made.lora_config = LoRAConfig(max_lora_rank=8, max_loras=1) if lora else None
    return made


def stock(vllm_config: VllmConfig) -> type:
    found = Executor.get_class
    return getattr(found, "__wrapped__", found)(vllm_config)


@pytest.mark.parametrize(
    ("backend", "base"),
    [
        ("uni", UniProcExecutor),
        ("mp", MultiprocExecutor),
        ("external_launcher", ExecutorWithExternalLauncher),
        (OwnExecutor, OwnExecutor),
        (f"{__name__}.OwnExecutor", OwnExecutor),
    ],
    ids=["uni", "mp", "external_launcher", "class", "name"],
)
def test_executor_class_is_derived_from_the_configured_one(backend, base):
    found = module.get_class(stock, config(backend))
    assert issubclass(found, AdapterExecutorMixin)
    assert issubclass(found, base)
    assert module.get_class(lambda _: found, config(backend)) is found


def test_executor_class_without_lora_is_the_configured_one():
    assert module.get_class(stock, config("mp", lora=False)) is MultiprocExecutor


def test_executor_class_with_tenants_and_without_lora_chooses_the_scheduler(monkeypatch):
    monkeypatch.setattr(module, "has_wall", lambda vllm_config: True)
    found = module.get_class(stock, config(OwnExecutor, lora=False))
    assert issubclass(found, AdapterExecutorMixin)
    assert issubclass(found, OwnExecutor)


def test_executor_class_sent_to_a_new_process_is_found_there():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for base in (MultiprocExecutor, OwnExecutor):
            made = adapter_loading(base)
            assert pickle.loads(pickle.dumps(made)) is made
            assert pool.apply(bases_of, (made,)) == ["AdapterExecutorMixin", base.__name__]


def bases_of(made: type) -> list[str]:
    return [base.__name__ for base in made.__bases__]


@pytest.mark.parametrize("call", ["add", "remove", "pin"])
def test_workers_called_for_single_adapters_when_the_engine_loads_them_refuse(call):
    executor = StartedExecutor(SchedulerStub(adapters=object()), None)
    with pytest.raises(MultiLoRAError, match=f"workers {call} no LoRA adapters"):
        executor.collective_rpc(f"{call}_lora", args=(1,))
    assert executor.called == []
    others = StartedExecutor(SchedulerStub(adapters=None), None)
    others.collective_rpc(f"{call}_lora", args=(1,))
    assert others.called == [f"{call}_lora"]


def test_adapters_listed_by_a_worker_call_are_those_in_host_memory_too():
    states = {1: AdapterState.SLOT, 2: AdapterState.HOST, 3: AdapterState.ABSENT}
    known = [SimpleNamespace(number=n, state=state) for n, state in states.items()]
    adapters = SimpleNamespace(known=lambda: known, slots=None, pushed=PushedFolders())
    executor = StartedExecutor(SchedulerStub(adapters), None)
    assert executor.collective_rpc("list_loras") == [{1, 2}]
    assert executor.called == []


def test_an_engine_core_in_its_own_process_can_be_woken_by_its_executor():
    executor = StartedExecutor(SchedulerStub(), None)
    core = SimpleNamespace(model_executor=executor, input_queue=Queue())
    given = []
    module.process_input_sockets(lambda *arguments: given.append(arguments), core, ["inputs"], None)
    assert executor.inputs is core.input_queue
    assert given == [(core, ["inputs"], None)]
