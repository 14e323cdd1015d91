"""A session of vLLM's WebSocket is answered by the base model, or closed."""

import asyncio
import json
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection

from vllm_multilora.gateway.answers import HttpCallMiddleware
from vllm_multilora.gateway.names.names_middleware import only_base_model
from vllm_multilora.integration.patching.tables.ledger import PATCHES

BASE, ADAPTER = "base", "acme"
COMMIT = {"type": "input_audio_buffer.commit"}


class Session:
    """vLLM's WebSocket behind the gateway, without a network and an engine.

    Attributes:
        sent: What the client has got, in the order in which it came.
        begun: How many answers were begun.
    """

    def __init__(self, *events: Any) -> None:
        for patch in PATCHES:
            if patch.name == "error-texts":
                assert patch.apply()
        self.sent: list[dict[str, Any]] = []
        self.begun = 0
        self._events = [{"type": "websocket.connect"}, *map(_received, events)]
        self._models = SimpleNamespace(
            base_model_paths=[SimpleNamespace(name=BASE)],
            is_base_model=lambda name: name == BASE,
            lora_requests={ADAPTER: SimpleNamespace()},
        )
        gateway = HttpCallMiddleware(partial(only_base_model, self._vllm, self._models))
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        asyncio.run(gateway(scope, self._receive, self._send))

    @property
    def reported(self) -> list[dict[str, Any]]:
        """The events that the client has got."""
        return [json.loads(each["text"]) for each in self.sent if each["type"] == "websocket.send"]

    @property
    def is_closed(self) -> bool:
        return {"type": "websocket.close", "code": 1008, "reason": "model"} in self.sent

    async def _receive(self) -> dict[str, Any]:
        end = {"type": "websocket.disconnect", "code": 1000}
        return self._events.pop(0) if self._events else end

    async def _send(self, message: Any) -> None:
        assert not self.is_closed
        self.sent.append(message)

    async def _vllm(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.websockets import WebSocket

        serving: Any = object.__new__(type("Serving", (BaseServing,), {}))
        serving.models = self._models
        connection: Any = RealtimeConnection(WebSocket(scope, receive, send), serving)
        connection.start_generation = self._begin
        await connection.handle_connection()

    async def _begin(self) -> None:
        self.begun += 1


def _received(event: Any) -> dict[str, Any]:
    if isinstance(event, bytes):
        return {"type": "websocket.receive", "bytes": event, "text": event.decode()}
    return {"type": "websocket.receive", "text": json.dumps(event)}


def name(model: Any) -> dict[str, Any]:
    return {"type": "session.update", "model": model}


@pytest.mark.smoke
def test_session_that_names_the_base_model_is_answered() -> None:
    session = Session(name(BASE), COMMIT)
    assert session.begun == 1
    assert not session.is_closed


@pytest.mark.smoke
@pytest.mark.parametrize("model", [ADAPTER, "nobody", {"no": "name"}, 7])
@pytest.mark.parametrize("takes_any", ["0", "1"], ids=["known-names", "any-name"])
def test_session_that_names_another_model_is_closed(
    model: Any, takes_any: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would go on with the base model, which the session has named before."""
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", takes_any)
    session = Session(name(BASE), COMMIT, name(model), COMMIT)
    if model != ADAPTER and takes_any == "1":
        assert (session.begun, session.is_closed) == (2, False)
        return
    assert (session.begun, session.is_closed) == (1, True)
    assert str(model) in session.reported[-1]["error"]
    if model == ADAPTER:
        assert f"found the model `{ADAPTER}`, expected `{BASE}`" in session.reported[-1]["error"]


@pytest.mark.parametrize(
    "event",
    [
        rb'{"type": "session\u002eupdate", "model": "\u0061cme"}',
        rb'{"type": "session.update", "model": "acme", "x": NaN}',
        rb'{"type": "session.update", "model": "base", "model": "acme"}',
    ],
    ids=["escaped", "not-json-but-pythons", "twice"],
)
def test_adapter_is_found_however_the_event_is_written(event: bytes) -> None:
    session = Session(name(BASE), event, COMMIT)
    assert (session.begun, session.is_closed) == (0, True)


def test_a_long_name_of_a_model_takes_no_time() -> None:
    """vLLM looks for paths in what it answers, and takes the third power of a path's length."""
    begun = time.thread_time()
    session = Session(name("/a" * 4_096), {"type": "/a" * 4_096})
    assert time.thread_time() - begun < 1.0
    assert "does not exist" in session.reported[-1]["error"]
