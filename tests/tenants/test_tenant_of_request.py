"""A request's tenant travels with it, where no client can write it."""

from dataclasses import dataclass

import pytest

from vllm_multilora.integration.tenant_of_request import (
    RequestTenant,
    set_tenant,
    take_tenant,
    tenant_in,
    tenant_of,
    with_tenant,
    without_tenant,
)

TRACING = {"traceparent": "00-1-2-01"}
ACME = RequestTenant("acme", 0.25, 7)


@dataclass
class Request:
    trace_headers: dict[str, str] | None = None


@pytest.mark.parametrize("headers", [None, TRACING], ids=["no-tracing", "tracing"])
@pytest.mark.parametrize("resident", [None, 3])
def test_a_tenant_is_read_as_it_was_written(headers: dict[str, str] | None, resident: int | None):
    tenant = RequestTenant("acme", 2.5, resident)
    written = with_tenant(headers, tenant)
    assert tenant_in(written) == tenant
    assert without_tenant(written) == headers
    assert without_tenant(headers) == headers


@pytest.mark.parametrize("headers", [None, TRACING], ids=["no-tracing", "tracing"])
def test_a_request_of_nobody_has_no_tenant(headers: dict[str, str] | None):
    request = Request(headers)
    take_tenant(request)
    assert tenant_of(request) is None
    assert request.trace_headers == headers


@pytest.mark.parametrize("headers", [None, TRACING], ids=["no-tracing", "tracing"])
def test_the_engine_core_knows_the_tenant_and_sends_it_back_with_no_output(
    headers: dict[str, str] | None,
):
    request = Request(headers)
    set_tenant(request, ACME)
    assert tenant_of(request) == ACME
    take_tenant(request)
    assert tenant_of(request) == ACME
    assert request.trace_headers == headers
    take_tenant(request)  # a request that arrives twice
    assert tenant_of(request) == ACME


def test_vllm_carries_it_in_its_own_messages():
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request as EngineRequest
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    sent = EngineCoreRequest(
        request_id="1",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    set_tenant(sent, ACME)
    received = MsgpackDecoder(EngineCoreRequest).decode(MsgpackEncoder().encode(sent))
    request = EngineRequest.from_engine_core_request(received, None)
    take_tenant(request)
    assert tenant_of(request) == ACME
    assert request.trace_headers is None
