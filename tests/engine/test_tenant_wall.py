"""With tenants, an engine's scheduler takes sealed requests and fails all others before a step."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.lora.request import LoRARequest
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_multilora.integration.engine.requests.tenant_wall import tenant_of
from vllm_multilora.integration.failed_requests import from_stop_reason
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS
from vllm_multilora.integration.seals import Seal, sealed

from .scheduling.real_scheduler import Steps, make_config

SECRET = "the secret of this start"
ACME = Seal("acme", 2.5, 7, "salt of acme")


def request_with(salt=None, *, name="1", adapter=None, pooling=False, priority=0):
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(range(40)),
        mm_features=None,
        sampling_params=None if pooling else SamplingParams(max_tokens=1, ignore_eos=True),
        pooling_params=PoolingParams(task="embed") if pooling else None,
        arrival_time=0.0,
        lora_request=None if adapter is None else LoRARequest("a", adapter, "/nowhere"),
        cache_salt=salt,
        data_parallel_rank=None,
        priority=priority,
        external_req_id=name,
    )


class Engine:
    """An engine core's way of a request into its scheduler.

    Args:
        config: Of the engine.
        base: vLLM's scheduler class.
    """

    def __init__(self, config, base=Scheduler):
        self.steps = Steps(config, base)
        self.scheduler = self.steps.scheduler
        self.outputs = []
        update = self.scheduler.update_from_output
        self.scheduler.update_from_output = lambda *args: self.outputs.append(update(*args))
        init_none_hash(hash)
        assert not CORE_SEAMS.missing({"prefix-cache-keys"})
        self._core = SimpleNamespace(
            scheduler=self.scheduler,
            mm_receiver_cache=None,
            request_block_hasher=get_request_block_hasher(16, lambda value: repr(value).encode()),
        )

    def add(self, request):
        sent = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(request))
        made, _ = EngineCore.preprocess_add_request(self._core, sent)
        self.scheduler.add_request(made)
        return made

    def failures(self):
        return [
            output for step in self.outputs for each in step.values() for output in each.outputs
        ]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTILORA_CACHE_SALT", SECRET)
    return make_config(
        tmp_path, places=8, step_tokens=256, prefix_caching=True, tenants="tenants.yaml"
    )


FOREIGN = {
    "no-salt": None,
    "own-salt": "a client's own",
    "other-secret": sealed("another secret", ACME),
    "changed": sealed(SECRET, ACME).replace("acme", "zen"),
}


@pytest.mark.parametrize(
    ("base", "fair", "adapter"),
    [(Scheduler, True, None), (Scheduler, False, 5), (AsyncScheduler, True, 5)],
)
@pytest.mark.parametrize("salt", FOREIGN.values(), ids=FOREIGN)
def test_request_without_a_seal_fails_before_its_first_step(config, base, fair, salt, adapter):
    config.additional_config["multilora"]["fair_shares"] = fair
    engine = Engine(config, base)
    engine.add(request_with(salt, adapter=adapter))
    assert engine.scheduler.has_requests()
    assert engine.steps.schedule() == {}
    engine.steps.compute()
    (output,) = engine.failures()
    assert (output.finish_reason, output.new_token_ids) == (FinishReason.ERROR, [])
    assert "answers HTTP calls to known routes only" in from_stop_reason(output.stop_reason).message
    assert not engine.scheduler.has_requests()
    assert not engine.scheduler.requests


def test_pooling_request_without_a_seal_has_the_empty_result_that_vllm_needs(config):
    engine = Engine(config)
    engine.add(request_with(pooling=True))
    engine.steps.step()
    (output,) = engine.failures()
    assert output.pooling_output.numel() == 0


def test_others_requests_run_in_the_step_that_ends_an_unsealed_one(config):
    engine = Engine(config)
    engine.add(request_with(name="unsealed"))
    engine.add(request_with(sealed(SECRET, ACME), name="sealed"))
    assert list(engine.steps.step()) == ["sealed"]
    assert {output.request_id for output in engine.failures()} == {"unsealed", "sealed"}


@pytest.mark.parametrize("adapter", [None, 5], ids=["base-model", "adapter"])
def test_sealed_request_when_it_arrives_is_its_tenants(config, adapter):
    engine = Engine(config)
    made = engine.add(request_with(sealed(SECRET, ACME), adapter=adapter, priority=-5))
    assert tenant_of(made) == ACME
    assert (made.cache_salt, made.priority) == ("salt of acme", 0)
    assert engine.steps.step() == {"1": 40}


def test_cached_blocks_are_keyed_by_the_salt_and_not_by_the_seal(config):
    engine = Engine(config)
    seals = (ACME, ACME._replace(weight=1.0), ACME._replace(salt="other"), Seal())
    keys = [
        engine.add(request_with(sealed(SECRET, seal), name=str(number))).block_hashes
        for number, seal in enumerate(seals)
    ]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    assert keys[3] not in keys[:3]


def test_seal_in_a_requests_id_is_read_as_one_in_its_salt(config):
    engine = Engine(config)
    made = engine.add(request_with(name=f"embd-7~{sealed(SECRET, ACME)}~-0-1a2b3c4d"))
    assert tenant_of(made) == ACME
    assert made.cache_salt == "salt of acme"


def test_operators_request_has_no_tenant_and_keeps_its_priority(config):
    engine = Engine(config)
    made = engine.add(request_with(sealed(SECRET, Seal()), priority=-5))
    assert tenant_of(made) is None
    assert (made.cache_salt, made.priority) == (None, -5)
    assert engine.steps.step() == {"1": 40}


def test_engine_without_tenants_takes_requests_as_they_are(config):
    del config.additional_config["multilora"]["tenants"]
    engine = Engine(config)
    made = engine.add(request_with("a client's own"))
    assert made.cache_salt == "a client's own"
    assert engine.steps.step() == {"1": 40}


def test_scheduler_that_knows_no_adapters_has_the_wall_too(config, monkeypatch):
    from vllm_multilora.integration.engine import executor

    monkeypatch.setattr(executor, "loads_adapters", lambda vllm_config: False)
    engine = Engine(config)
    engine.add(request_with())
    assert engine.steps.schedule() == {}
    engine.steps.compute()
    assert len(engine.failures()) == 1
