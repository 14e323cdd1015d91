"""A stream that fails before its first result has a status; a response that fails later ends."""

import asyncio
import json
from http import HTTPStatus

import httpx
import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai.types.responses import ResponseError, ResponseFailedEvent
from vllm import SamplingParams
from vllm.entrypoints.openai.responses.protocol import (
    ResponseCreatedEvent,
    ResponseInProgressEvent,
    ResponsesRequest,
    ResponsesResponse,
)
from vllm.exceptions import GracefulHTTPError
from vllm.lora.request import LoRARequest

from vllm_multilora.gateway.answers import HttpCallMiddleware
from vllm_multilora.integration.server.requests.http_calls import current_call

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
GONE = GracefulHTTPError("adapter 'acme' could not be loaded", HTTPStatus.NOT_FOUND)
FULL = GracefulHTTPError("there is no memory", HTTPStatus.SERVICE_UNAVAILABLE)
TOKEN = b'data: {"choices":[]}\n\n'
DONE = b"data: [DONE]\n\n"


def event(name, **fields):
    return f"event: {name}\ndata: {json.dumps(fields)}\n\n".encode()


def error_event(code):
    return b"data: %s\n\n" % json.dumps({"error": {"message": "why", "code": code}}).encode()


def response_events():
    """The first events of vLLM's stream of a response."""
    request = ResponsesRequest(model="acme", input="hello")
    begun = ResponsesResponse.from_request(
        request, SamplingParams(max_tokens=3), "acme", 1, [], "in_progress"
    ).model_dump()
    made = (
        ResponseCreatedEvent(type="response.created", sequence_number=0, response=begun),
        ResponseInProgressEvent(type="response.in_progress", sequence_number=1, response=begun),
    )
    return [f"event: {e.type}\ndata: {e.model_dump_json(by_alias=True)}\n\n".encode() for e in made]


def ask(path, events, *, adapter=True, server=FastAPI):
    """A stream's answer as a client gets it; an exception among the events ends them."""

    async def make():
        for each in events:
            if isinstance(each, Exception):
                raise each
            yield each

    app = server()

    @app.post(path)
    async def answer():
        if adapter:
            current_call.get().lora = LoRARequest("acme", 1, "/acme")
        return StreamingResponse(make(), media_type="text/event-stream")

    app.add_middleware(HttpCallMiddleware)

    async def send():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path)

    return asyncio.run(send())


class Handling(FastAPI):
    """Handles vLLM's errors, as vLLM's application does."""

    def __init__(self):
        super().__init__()
        self.add_exception_handler(GracefulHTTPError, lambda request, error: None)


@pytest.mark.parametrize("code", [400, 404, 503])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/inference/v1/generate"])
def test_stream_that_fails_at_once_has_its_errors_status(path, code):
    answer = ask(path, [error_event(code), DONE])
    assert answer.status_code == code
    assert answer.json() == {"error": {"message": "why", "code": code}}
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("kind", "status"), [("not_found_error", 404), ("internal_error", 500), (None, 500)]
)
def test_stream_of_messages_that_fails_at_once_has_the_status_of_its_type(kind, status):
    failed = event("error", type="error", error={"type": kind, "message": "why"})
    answer = ask(MESSAGES, [failed])
    assert answer.status_code == status
    assert answer.json()["error"]["message"] == "why"


@pytest.mark.parametrize("server", [FastAPI, Handling], ids=["unhandled", "handled"])
@pytest.mark.parametrize("failure", [GONE, FULL], ids=["gone", "memory"])
def test_response_that_fails_before_its_first_result_has_a_status(failure, server):
    answer = ask(RESPONSES, [*response_events(), failure], server=server)
    assert answer.status_code == failure.http_status
    assert answer.json()["error"]["message"] == failure.message


@pytest.mark.parametrize("server", [FastAPI, Handling], ids=["unhandled", "handled"])
@pytest.mark.parametrize(
    ("failure", "code"), [(GONE, "invalid_prompt"), (FULL, "server_error")], ids=["gone", "memory"]
)
def test_response_that_fails_later_ends_with_the_reason(failure, code, server):
    delta = event("response.output_text.delta", delta="a")
    begun = [*response_events(), delta]
    answer = ask(RESPONSES, [*begun, failure], server=server)
    assert answer.status_code == 200
    assert answer.content.startswith(b"".join(begun))
    name, data = answer.text.rstrip().rsplit("\n\n", 1)[1].split("\n")
    assert name == "event: response.failed"
    last = json.loads(data.removeprefix("data: "))
    ResponseFailedEvent.model_validate(last)
    assert last["sequence_number"] == 3
    first = json.loads(begun[0].split(b"data: ")[1])["response"]
    assert last["response"] == {**first, "status": "failed", "error": last["response"]["error"]}
    error = ResponseError.model_validate(last["response"]["error"])
    assert (error.code, error.message) == (code, failure.message)
    assert error.type == failure.http_status.phrase


def test_stream_passes_as_it_is_and_an_error_in_its_midst_too():
    for events in ([TOKEN, TOKEN, DONE], [TOKEN, error_event(400), DONE], [DONE], []):
        answer = ask(CHAT, events)
        assert (answer.status_code, answer.content) == (200, b"".join(events))


def test_text_that_looks_like_an_error_passes():
    for text in (b'data: {"choices":[{"text":"\\"error\\""}]}\n\n', b'data: {"error":7}\n\n'):
        answer = ask(CHAT, [text, DONE])
        assert (answer.status_code, answer.content) == (200, text + DONE)


def test_stream_of_the_base_model_is_left_as_it_is():
    answer = ask(CHAT, [error_event(400), DONE], adapter=False)
    assert (answer.status_code, answer.content) == (200, error_event(400) + DONE)


def test_other_exceptions_are_left_to_vllm():
    for path in (CHAT, RESPONSES):
        for begun in ([], [TOKEN]):
            with pytest.raises(ValueError, match="vLLM's own"):
                ask(path, [*begun, ValueError("vLLM's own")])
