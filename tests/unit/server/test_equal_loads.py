"""Loads of one adapter at once, through vLLM's own table of models."""

import asyncio
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.utils.counter import AtomicCounter

from vllm_multilora.integration.api_server.equal_loads import load_lora_adapter

STOCK = getattr(
    OpenAIServingModels.load_lora_adapter, "__wrapped__", OpenAIServingModels.load_lora_adapter
)  # another test may have loaded the plugin


class Engine:
    """Reads an adapter in a moment, or refuses it."""

    def __init__(self) -> None:
        self.loads = 0
        self.error: Exception | None = None

    async def add_lora(self, lora: Any) -> bool:
        self.loads += 1
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        return True


def load_all(engine: Engine, *paths: str) -> list[Any]:
    """The answers to loads of one name that come at once."""

    async def scenario() -> list[Any]:
        models = OpenAIServingModels.__new__(OpenAIServingModels)
        models.engine_client = engine  # type: ignore[assignment]
        models.registry = SimpleNamespace(is_base_model="base".__eq__)  # type: ignore[assignment]
        models.lora_requests, models.lora_id_counter = {}, AtomicCounter(0)
        models.lora_resolver_lock = defaultdict(asyncio.Lock)
        requests = (LoadLoRAAdapterRequest(lora_name="acme", lora_path=path) for path in paths)
        calls = (load_lora_adapter(STOCK, models, request) for request in requests)
        return list(await asyncio.gather(*calls))

    return asyncio.run(scenario())


def test_equal_loads_at_once_all_succeed_and_load_once() -> None:
    engine = Engine()
    assert load_all(engine, *6 * ["/acme"]) == 6 * [
        "Success: LoRA adapter 'acme' added successfully."
    ]
    assert engine.loads == 1


def test_a_load_of_other_files_is_refused() -> None:
    first, second = load_all(Engine(), "/acme", "/other")
    assert isinstance(first, str)
    assert isinstance(second, ErrorResponse)
    assert "already been loaded" in second.error.message


def test_a_load_that_fails_fails_for_all() -> None:
    engine = Engine()
    engine.error = ValueError("contains NaN")
    answers = load_all(engine, "/acme", "/acme")
    assert all(isinstance(answer, ErrorResponse) for answer in answers)
    assert engine.loads == 2
