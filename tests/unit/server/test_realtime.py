"""A session of vLLM's WebSocket is answered by what it has named last, or by nothing."""

import asyncio
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.entrypoints.speech_to_text.realtime.connection import RealtimeConnection

from vllm_multilora.integration.patching.tables.ledger import PATCHES
from vllm_multilora.integration.server.requests.metering import METER, ServerMeter

BASE, ADAPTER = "base", "acme"


class Session:
    """vLLM's WebSocket without a network and an engine.

    Attributes:
        told: The events that the client has got.
        begun: How many answers were begun.
    """

    def __init__(self) -> None:
        for patch in PATCHES:
            if patch.name in ("realtime-model", "error-texts"):
                assert patch.apply()
        self.told: list[dict[str, Any]] = []
        self.begun = 0
        processor = SimpleNamespace()
        METER.set(processor, ServerMeter(None))
        serving: Any = object.__new__(type("Serving", (BaseServing,), {}))
        serving.models = SimpleNamespace(
            engine_client=SimpleNamespace(output_processor=processor),
            base_model_paths=[SimpleNamespace(name=BASE)],
            is_base_model=lambda name: name == BASE,
            lora_requests={ADAPTER: SimpleNamespace()},
        )
        websocket: Any = SimpleNamespace(send_text=self._hear)
        self._connection: Any = RealtimeConnection(websocket, serving)
        self._connection.start_generation = self._begin

    async def _hear(self, event: str) -> None:
        self.told.append(json.loads(event))

    async def _begin(self) -> None:
        self.begun += 1

    def name(self, model: Any) -> None:
        self._send({"type": "session.update", "model": model})

    def commit(self) -> None:
        self._send({"type": "input_audio_buffer.commit"})

    def _send(self, event: dict[str, Any]) -> None:
        asyncio.run(self._connection.handle_event(event))


@pytest.mark.smoke
@pytest.mark.parametrize("model", [ADAPTER, "nobody", {"no": "name"}])
@pytest.mark.parametrize("takes_any", ["0", "1"], ids=["known-names", "any-name"])
def test_the_base_model_answers_only_who_has_named_it_last(
    model: Any, takes_any: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", takes_any)
    session = Session()
    session.name(BASE)
    session.commit()
    assert (session.begun, session.told) == (1, [])
    session.name(model)
    session.commit()
    if model != ADAPTER and takes_any == "1":
        assert session.begun == 2
        return
    assert session.begun == 1
    named, committed = session.told
    assert str(model) in named["error"]
    assert committed["code"] == "model_not_validated"
    if model == ADAPTER:
        assert f"found the model `{ADAPTER}`, expected `{BASE}`" in named["error"]
    session.name(BASE)
    session.commit()
    assert session.begun == 2


def test_a_long_name_of_a_model_takes_no_time() -> None:
    """vLLM looks for paths in what it answers, and takes the third power of a path's length."""
    session = Session()
    begun = time.thread_time()
    session.name("/a" * 4_096)
    assert time.thread_time() - begun < 1.0
    [named] = session.told
    assert "does not exist" in named["error"]
