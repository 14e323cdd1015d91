"""What an API server does once it can reach its engine, before its first request."""

from __future__ import annotations

from typing import Any

from vllm_multilora.integration import adapter_directory, routes


async def start(models: Any) -> None:
    """Runs once in every API server, on its event loop, after `--lora-modules` were loaded.

    Args:
        models: vLLM's `OpenAIServingModels`.
    """
    await adapter_directory.start(models)
    routes.start(models)
