"""What no check has granted does not reach the engine, and what does is marked as its tenant's."""

import re
from functools import partial
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import vllm
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError
from vllm.sampling_params import (
    SamplingParams,
)

from tests.tenants.callers import as_caller
from vllm_multilora.gateway.table import MAX_ITEMS
from vllm_multilora.integration.api_server.failure_delivery import HIDDEN_FOLDERS
from vllm_multilora.integration.server.requests.callers import (
    MAX_ANSWERS,
    Caller,
)
from vllm_multilora.integration.server.requests.engine_admission import follow
from vllm_multilora.integration.server.requests.metering import METER, ServerMeter
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant, TenantLimits

ADAPTER = SimpleNamespace(lora_name="acme-a", lora_path="/data/acme-a")


class Processor:
    """Keeps a state for each request, as vLLM's does; each has generated what it is told to."""

    def __init__(self) -> None:
        self.tokens = 0
        self.request_states: dict[str, Any] = {}
        follow(self)

    def add(self, adapter: Any, request_id: str = "1", index: int = 0, parent: Any = None) -> None:
        self.request_states[request_id] = SimpleNamespace(
            request_id=request_id,
            prompt_len=40,
            detokenizer=SimpleNamespace(num_output_tokens=lambda: self.tokens),
            lora_request=adapter,
            parent_req=parent,
            request_index=index,
        )


def engines_request(request_id: str, external_req_id: str) -> Any:
    """vLLM's own, for a prompt of one token."""
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1],
        mm_features=None,
        sampling_params=SamplingParams(detokenize=False),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=external_req_id,
    )


def tenant(name: str) -> Caller:
    return Caller(Role.TENANT, account=Account(Tenant(name)), granted={None})


def caller(*granted: str | None, **limits: Any) -> Caller:
    account = Account(Tenant("acme", weight=2, limits=TenantLimits(**limits)), clock=lambda: 0.0)
    return Caller(Role.TENANT, ("/srv",), True, account, "secret", set(granted))


def send(who: Caller | None, processor: Processor, adapter: Any = None, **fields: Any) -> None:
    as_caller(who, lambda: processor.add(adapter, **fields))


@pytest.mark.parametrize("granted", [(), (None,), ("acme-b",)], ids=str)
def test_what_was_not_granted_does_not_pass(granted):
    processor = Processor()
    with pytest.raises(VLLMNotFoundError):
        send(caller(*granted), processor, ADAPTER)
    assert not processor.request_states


def test_the_base_model_is_granted_too():
    with pytest.raises(VLLMNotFoundError):
        send(caller("acme-a"), Processor())
    send(caller(None), Processor())


def test_folders_are_hidden_from_a_tenants_request():
    processor = Processor()
    send(caller("acme-a"), processor, ADAPTER)
    assert HIDDEN_FOLDERS.get(processor.request_states["1"]) == ("/srv", "/data/acme-a")


def test_requests_of_others_pass():
    for who in (None, Caller(Role.OPERATOR), Caller(Role.CLIENT, ("/srv",), True)):
        processor = Processor()
        send(who, processor, ADAPTER)
        assert list(processor.request_states) == ["1"]


def test_several_answers_share_a_prompt_and_count_each():
    who, processor = caller("acme-a", tokens_per_minute=100, answers=3), Processor()
    parent = SimpleNamespace(sampling_params=SimpleNamespace(n=3))
    for index in range(3):
        send(who, processor, ADAPTER, request_id=str(index), index=index, parent=parent)
    account = who.account
    assert account is not None
    processor.tokens = 16
    account.settle()
    account.charge(11)
    assert account._bucket is not None
    assert account._bucket.wait_s() == 0  # 40 + 3 * 16 + 11
    processor.request_states.clear()  # they have ended
    processor.tokens = 17
    account.settle()
    assert account._bucket.wait_s() > 0


def test_a_tenants_call_requests_few_enough_answers_to_begin_them_in_a_moment():
    """A call may have many prompts or many answers each."""
    parent = SimpleNamespace(sampling_params=SimpleNamespace(n=MAX_ANSWERS - 1))

    def begin(who: Caller | None, number: int, parent: Any = None) -> None:
        send(who, processor, request_id=str(number), parent=parent)

    for who in (None, Caller(Role.CLIENT), tenant("acme")):
        processor = Processor()
        begin(who, 0, parent)
        begin(who, 1)
        if who is None or who.tenant is None:
            begin(who, 2)
            continue
        with pytest.raises(GracefulHTTPError, match="2048 answers"):
            begin(who, 2)
        assert list(processor.request_states) == ["0", "1"]


def test_a_tenants_running_calls_request_no_more_answers_than_it_may_have_at_a_time():
    """A call that wants many is one, but takes as many places and as much of the KV cache."""
    account = Account(Tenant("acme", limits=TenantLimits(running=2, answers=8)))
    processor = Processor()

    def begin(number: int, answers: int) -> Caller:
        who = Caller(Role.TENANT, account=account, granted={None})
        parent = SimpleNamespace(sampling_params=SimpleNamespace(n=answers))
        send(who, processor, request_id=str(number), parent=parent)
        return who

    def is_refused(number: int, answers: int) -> bool:
        with pytest.raises(GracefulHTTPError, match=r"answers at a time \(8\)") as refusal:
            begin(number, answers)
        return refusal.value.http_status == HTTPStatus.TOO_MANY_REQUESTS

    first = begin(0, 5)
    assert is_refused(1, 4)
    begin(2, 3)
    first.ended()
    begin(3, 5)
    assert is_refused(4, 1)
    with pytest.raises(GracefulHTTPError, match="One call may want 8 answers"):
        begin(5, 9)  # however long it would wait
    assert list(processor.request_states) == ["0", "2", "3"]


def test_a_tenants_answers_count_until_each_has_ended():
    """A call may want one after the other, when it has tools, and long ones beside short ones."""
    from vllm.v1.engine.output_processor import OutputProcessor

    processor = OutputProcessor(None, log_stats=False)
    follow(processor)
    METER.set(processor, ServerMeter(None))
    account = Account(Tenant("acme", limits=TenantLimits(answers=1)))

    def ask(who: Caller, number: int) -> None:
        request = engines_request(str(number), str(number))
        as_caller(who, partial(processor.add_request, request, None))

    first, second = (Caller(Role.TENANT, account=account, granted={None}) for _ in range(2))
    for number in range(3):
        ask(first, number)
        with pytest.raises(GracefulHTTPError, match="answers at a time"):
            ask(second, 9)
        assert second.retry_after_s == 1
        processor.abort_requests([str(number)], internal=True)
    ask(second, 3)
    first.ended()
    with pytest.raises(GracefulHTTPError, match="answers at a time"):
        ask(first, 9)


def test_there_is_room_in_vllms_second_model_runner_for_what_is_let_through():
    source = Path(vllm.__file__).with_name("v1") / "worker/gpu/sample/logit_bias.py"
    found = re.findall(r"^MAX_NUM_(\w+) = (\d+)$", source.read_text(), re.MULTILINE)
    room = {name: int(number) for name, number in found}
    assert room["LOGIT_BIAS_TOKENS"] >= MAX_ITEMS["logit_bias"]
    assert room["STOP_TOKEN_IDS"] > MAX_ITEMS["stop_token_ids"]  # the model's own are among these
