"""No tenant's grammars keep everybody waiting."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from tests.engine.fake_scheduler import FakeOutput, FakeRequest
from vllm_multilora.failures import FailureKind, RequestFailure
from vllm_multilora.integration.engine import grammars
from vllm_multilora.integration.engine.grammars import (
    ALLOWED_PER_TOKEN_S,
    ALLOWED_S,
    keep_apart,
    take_bad,
)
from vllm_multilora.integration.failures import from_stop_reason
from vllm_multilora.integration.tenant_of_request import TENANT, RequestTenant
from vllm_multilora.plugin import register

from .test_scheduler import no_naps, server, servers

__all__ = ["no_naps", "server", "servers"]


@dataclass
class Clock:
    now: float = 0.0

    def thread_time(self) -> float:
        return self.now


@dataclass
class Grammar:
    """Takes so long for the tokens that it is asked for, and then no time."""

    clock: Clock
    seconds: list[float] = field(default_factory=list)
    mask: int = 7

    def is_terminated(self) -> bool:
        return False

    def fill_bitmask(self, bitmask: Any, index: int) -> None:
        self.clock.now += self.seconds.pop(0) if self.seconds else 0.0
        bitmask[index] = self.mask

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.clock.now += self.seconds.pop(0) if self.seconds else 0.0
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return [token for token in tokens if token]


NO_OUTPUT = FakeOutput()


def plain_manager() -> Any:
    """vLLM's, without a backend, reasoning or drafts."""
    register()
    made: Any = object.__new__(StructuredOutputManager)
    made._grammar_bitmask = torch.zeros((8, 1), dtype=torch.int32)
    made._full_mask = torch.tensor(-1)
    made.enable_in_reasoning = True  # it has no reasoning to look at
    made.fill_bitmask_parallel_threshold = 8
    made.vllm_config = SimpleNamespace(
        num_speculative_tokens=0,
        model_config=SimpleNamespace(is_diffusion=False),
    )
    made.executor = ThreadPoolExecutor(1)
    return made


def manager() -> Any:
    made = plain_manager()
    keep_apart(made)
    return made


def fill(outputs: Any, requests: list[Any]) -> Any:
    names = {each.request_id: each for each in requests}
    return outputs.grammar_bitmask(names, list(names), {})


def request(name: str, grammar: Grammar, tenant: str | None = "acme") -> Any:
    made = FakeRequest(name)
    made.structured_output_request = SimpleNamespace(grammar=grammar)
    made.use_structured_output = True
    if tenant is not None:
        TENANT.set(made, RequestTenant(tenant))
    return made


def scheduler_of(outputs: Any, requests: list[Any]) -> Any:
    names = {each.request_id: each for each in requests}
    return SimpleNamespace(structured_output_manager=outputs, requests=names)


def test_tenants_take_turns_for_their_grammars_and_nobody_for_what_has_ended():
    begun, go_on = threading.Event(), threading.Event()
    compiled: list[str] = []

    def compiles(request: Any) -> str:
        begun.set()
        assert go_on.wait(30)
        if request.request_id == "acme 2":
            raise ValueError("no grammar")
        compiled.append(request.request_id)
        return f"of {request.request_id}"

    with ThreadPoolExecutor(1) as threads:
        outputs = SimpleNamespace(executor=threads)
        keep_apart(outputs)
        made = [request(f"acme {number}", Grammar(Clock())) for number in range(5)]
        made += [request(f"zen {number}", Grammar(Clock()), "zen") for number in range(2)]
        made.append(request("nobody's", Grammar(Clock()), None))
        found = {each.request_id: outputs.executor.submit(compiles, each) for each in made}
        assert begun.wait(30)
        made[1].status = RequestStatus.FINISHED_ABORTED
        go_on.set()
        outputs.executor.shutdown(wait=True)
        assert compiled == ["acme 0", "zen 0", "nobody's", "zen 1", "acme 3", "acme 4"]
    assert found["acme 1"].cancelled()
    assert isinstance(found["acme 2"].exception(0), ValueError)
    assert found["zen 1"].result(0) == "of zen 1"


def test_without_a_tokenizer_nobody_compiles_grammars():
    outputs = SimpleNamespace()
    keep_apart(outputs)
    keep_apart(None)
    assert not vars(outputs)


def test_the_slow_ones_are_told_apart(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(grammars, "time", clock)
    asked = {
        "at once": Grammar(clock, [ALLOWED_S + 0.1]),
        "again and again": Grammar(clock, [0.15] * 4),
        "once in a while": Grammar(clock, [ALLOWED_S - 0.1, 0.1, 0.0, 0.0]),
        "always a little": Grammar(clock, [ALLOWED_PER_TOKEN_S] * 1000),
        "nobody's": Grammar(clock, [9.0]),
    }
    requests = [
        request(name, grammar, None if name == "nobody's" else "acme")
        for name, grammar in asked.items()
    ]
    plain = FakeRequest("plain")
    plain.structured_output_request = None
    TENANT.set(plain, RequestTenant("acme"))
    outputs = manager()
    scheduler = scheduler_of(outputs, [*requests, plain])
    ended: dict[str, int] = {}
    for step in range(1000):
        assert (fill(outputs, requests) == 7).all()
        for name in take_bad(scheduler, NO_OUTPUT):
            ended.setdefault(name, step)
    assert ended == {"at once": 0, "again and again": 3}
    assert take_bad(scheduler, NO_OUTPUT) == {}, "they have been told of"


def test_nothing_is_kept_where_nobody_ends_requests():
    """Neither the plugin nor LoRA may be on."""
    outputs, grammar = plain_manager(), Grammar(Clock())
    assert fill(outputs, [request("1", grammar)]) == 7
    assert not hasattr(grammar, "vllm_multilora")
    assert not hasattr(outputs, "vllm_multilora")


def test_one_that_is_slow_to_go_on_by_an_answers_tokens_is_slow(monkeypatch):
    """`root ::= [a-z] root [a-z] | [a-z] | root root` tells at once what it allows next."""
    clock = Clock()
    monkeypatch.setattr(grammars, "time", clock)
    outputs = manager()
    plain, slow, sound = FakeRequest("plain"), Grammar(clock, [0.15] * 4), Grammar(clock)
    plain.structured_output_request = None
    running = [request("slow", slow), request("sound", sound), plain]
    scheduler = scheduler_of(outputs, running)
    plain.use_structured_output = False
    ended = []
    for _ in range(4):
        assert all(outputs.accept_tokens(each, [1, 2]) for each in running)
        ended.append(list(take_bad(scheduler, NO_OUTPUT)))
    assert ended == [[], [], [], ["slow"]]


def test_one_that_allows_no_token_ends_with_the_token_that_it_does_not_allow():
    """Not by an output of a step before, nor if it was stuck after a draft that was not taken."""
    outputs = manager()
    made = [request(name, Grammar(Clock(), mask=0), None) for name in ("late", "stuck", "drafted")]
    made.append(request("sound", Grammar(Clock()), None))
    scheduler = scheduler_of(outputs, made)
    fill(outputs, made)
    without_tokens = SimpleNamespace(req_id_to_index={"late": 0}, sampled_token_ids=[])

    def ended(**tokens: list[int]) -> list[str]:
        return list(take_bad(scheduler, FakeOutput(tokens=tokens)))

    assert take_bad(scheduler, without_tokens) == {}
    assert ended(late=[], stuck=[5, 0], drafted=[5, 6], sound=[0]) == ["stuck"]
    assert ended(late=[0], drafted=[0]) == ["late"]
    assert ended(late=[0], stuck=[0]) == [], "they have been told of"


def test_one_that_allows_no_token_ends_also_if_it_was_preempted_since_its_token_was_chosen(server):
    outputs = server.scheduler.structured_output_manager = manager()
    stuck = request("stuck", Grammar(Clock(), mask=0), None)
    server.scheduler.add_request(stuck)
    step = server.scheduler.schedule()
    fill(outputs, [stuck])
    server.scheduler._preempt_request(server.scheduler.running.pop(), 0.0)
    server.scheduler.update_from_output(step, FakeOutput(tokens={"stuck": [0]}))
    assert not server.scheduler.requests


def test_a_request_with_a_slow_grammar_ends_and_others_go_on(server, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(grammars, "time", clock)
    outputs = server.scheduler.structured_output_manager = manager()
    slow, other = (
        request(name, Grammar(clock, seconds), tenant)
        for name, seconds, tenant in (("slow", [9.0], "acme"), ("other", [], "zen"))
    )
    for each in (slow, other):
        server.scheduler.add_request(each)
    assert server.step() == {"slow", "other"}
    fill(outputs, [slow, other])
    server.step()
    assert server.names == {"other"}
    failure = from_stop_reason(server.ended["slow"])
    assert isinstance(failure, RequestFailure)
    assert failure.kind is FailureKind.INVALID
    assert "structured output" in failure.message
