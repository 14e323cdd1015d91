"""How every endpoint that generates says that a request has failed, as its clients read it."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httpx
from openai.types.responses import ResponseError, ResponseFailedEvent

from .engine import IS_0_33
from .server import VllmServer

ARGUMENTS = ("--enable-scale-out",)
"""Arguments of a server that has all of the endpoints."""

ENVIRONMENT = {"VLLM_ENABLE_RESPONSES_API_STORE": "1"}
"""Environment of a server that stores responses, and so computes them in the background."""

_TOKENS = [7, 8]
_TEXT = "t7 t8"
_MESSAGES = [{"role": "user", "content": _TEXT}]


@dataclass(frozen=True)
class Call:
    """What a client asks for.

    Attributes:
        path: The endpoint's.
        body: Without the model's name.
        how: For people: what is special about it.
        streams: Whether the answer is asked for as a stream.
        is_background: Whether it is computed in the background.
    """

    path: str
    body: Mapping[str, Any]
    how: str = ""
    streams: bool = False
    is_background: bool = False

    def __str__(self) -> str:
        how = (self.how, "streamed" * self.streams, "background" * self.is_background)
        return " ".join((self.path, *filter(None, how)))

    def send(self, server: VllmServer, model: str) -> httpx.Response:
        content = {**self.body, "model": model}
        if self.streams:
            content["stream"] = True
        if self.is_background:
            content |= {"background": True, "store": True}
        return server.post(self.path, content)


_RESPONSE = Call("/v1/responses", {"input": _TEXT, "max_output_tokens": 3})
_MESSAGE = Call("/v1/messages", {"messages": _MESSAGES, "max_tokens": 3})
"""Before vLLM 0.33, its stream ends without the reason."""
_MAY_STREAM = (
    Call("/v1/completions", {"prompt": _TOKENS}),
    Call("/v1/completions", {"prompt": [_TOKENS, _TOKENS], "n": 2}, "several"),
    Call("/v1/chat/completions", {"messages": _MESSAGES}),
    Call("/v1/chat/completions", {"messages": _MESSAGES, "n": 2}, "several"),
    _MESSAGE,
    Call("/inference/v1/generate", {"token_ids": _TOKENS, "sampling_params": {"n": 2}}),
    _RESPONSE,
)
CALLS = (
    *_MAY_STREAM,
    *(replace(call, streams=True) for call in _MAY_STREAM if call != _MESSAGE or IS_0_33),
    Call("/v1/completions", {"prompt": _TOKENS, "use_beam_search": True, "n": 2}, "beams"),
    Call("/v1/chat/completions/batch", {"messages": [_MESSAGES, _MESSAGES]}),
    Call("/generative_scoring", {"query": "t7", "items": ["t8"], "label_token_ids": _TOKENS}),
    replace(_RESPONSE, is_background=True, streams=True),
)


def assert_fails(
    server: VllmServer,
    call: Call,
    model: str,
    status: HTTPStatus,
    reason: str,
    *,
    streams_begin: bool = True,
) -> None:
    """A call for an adapter fails with a status and a reason.

    Args:
        server: Where to send it.
        call: The call.
        model: The adapter's name.
        status: What the status is, or what a stream or response says that it would be.
        reason: What the message contains.
        streams_begin: Whether a stream has begun by the time that the call fails.
    """
    response = call.send(server, model)
    if not (call.streams and (streams_begin or call.is_background)):
        assert response.status_code == status, response.text
        assert reason in response.json()["error"]["message"]
        return
    assert response.status_code == HTTPStatus.OK, response.text
    if call.path == _RESPONSE.path:
        _assert_response_fails(server, call, response, status, reason)
        return
    *_, (name, event) = _events(response)
    assert reason in event["error"]["message"]
    if call.path == "/v1/messages":
        assert name == event["type"] == "error"
    else:
        assert event["error"]["code"] == status
        assert response.text.endswith("data: [DONE]\n\n")


def _assert_response_fails(
    server: VllmServer, call: Call, answer: httpx.Response, status: HTTPStatus, reason: str
) -> None:
    events = list(_events(answer))
    name, last = events[-1]
    assert name == "response.failed", events
    assert last["sequence_number"] == len(events) - 1
    ResponseFailedEvent.model_validate(last)
    failed = last["response"]
    assert failed["status"] == "failed"
    error = ResponseError.model_validate(failed["error"])
    assert error.code == ("server_error" if status >= 500 else "invalid_prompt")
    assert error.type == status.phrase
    assert reason in error.message
    if call.is_background:
        path = f"/v1/responses/{failed['id']}"
        stored = server.get(path).json()
        assert (stored["status"], stored["error"]) == ("failed", failed["error"])
        assert list(_events(server.get(f"{path}?stream=true"))) == events


def _events(stream: httpx.Response) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """A stream's events by name, if they have names; without the sign of its end."""
    name = None
    for line in stream.text.splitlines():
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data" and value != "[DONE]":
            yield name, json.loads(value)
