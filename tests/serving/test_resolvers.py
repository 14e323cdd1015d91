"""Adapters that vLLM's resolvers find; the engine and the resolver are stand-ins."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from tests.serving.test_adapter_directory import Models, SlowEngine
from vllm_multilora.integration.server import registration, resolvers

pytestmark = pytest.mark.serving


class Resolver:
    """Finds what is in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base: str, name: str) -> LoRARequest:
        return LoRARequest(name, 1, str(self.folder / name))


def test_what_is_read_for_a_client_that_disconnects_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the engine would hold, under a number that nobody knows, one more for each of them."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "adapter_model.safetensors").write_text("good")

    async def scenario() -> None:
        engine = SlowEngine()
        models: Any = Models(engine)
        models.lora_resolvers = [Resolver(tmp_path)]
        models.model_config = SimpleNamespace(model="base")
        models.lora_id_counter = SimpleNamespace(inc=lambda by: 17)
        await engine.read_for_nobody(asyncio.create_task(resolvers.prepare(models, "acme")))
        assert engine.held == {17: "good"}
        assert models.lora_requests["acme"].lora_int_id == 17

    asyncio.run(scenario())
