"""How every endpoint that generates says that a request has failed, as its clients read it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httpx

from .engine import IS_0_33, SCALE_OUT
from .server import VllmServer

ARGUMENTS = SCALE_OUT
"""Arguments of a server that has all of the endpoints."""

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
    """

    path: str
    body: Mapping[str, Any]
    how: str = ""
    streams: bool = False

    def __str__(self) -> str:
        how = (self.how, "streamed" * self.streams)
        return " ".join((self.path, *filter(None, how)))

    def send(self, server: VllmServer, model: str) -> httpx.Response:
        content = {**self.body, "model": model}
        if self.streams:
            content["stream"] = True
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
)


def assert_fails(
    server: VllmServer,
    call: Call,
    model: str,
    status: HTTPStatus,
    reason: str,
) -> None:
    """A call for an adapter fails with a status and a reason.

    Args:
        server: Where to send it.
        call: The call.
        model: The adapter's name.
        status: What the status is, of streams too.
        reason: What the message contains.
    """
    response = call.send(server, model)
    assert response.status_code == status, response.text
    assert reason in response.json()["error"]["message"]
