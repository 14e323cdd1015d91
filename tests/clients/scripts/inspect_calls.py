"""inspect-ai's calls, by its provider of vLLM."""

import asyncio
import os
from typing import Any

from client_call import main, outcome
from inspect_ai.model import GenerateConfig, get_model


def answer(task: dict[str, Any], adapter: str, prompt: str) -> str:
    os.environ["VLLM_BASE_URL"] = f"{task['url']}/v1"
    os.environ["VLLM_API_KEY"] = task["admin_key"]
    suffix = f":{adapter}" if adapter else ""

    async def ask() -> str:
        config = GenerateConfig(temperature=0, max_tokens=task["max_tokens"], max_retries=0)
        async with get_model(f"vllm/base{suffix}", config=config) as model:
            return (await model.generate(prompt)).completion

    return asyncio.run(ask())


def answers(task: dict[str, Any]) -> dict[str, str]:
    """Asks adapters that are there, and one whose folder is registered by inspect-ai itself."""
    prompts = task["prompts"]
    found = {model: answer(task, model, prompts[model]) for model in prompts if model != "base"}
    found["folder"] = answer(task, task["folder"], task["prompt"])
    return found | {"base": answer(task, "", prompts["base"])}


def errors(task: dict[str, Any]) -> dict[str, Any]:
    return {
        "unknown model": outcome(lambda: answer(task, "unknown", "t1")),
        "broken folder": outcome(lambda: answer(task, task["folder"], "t1")),
    }


main(answers, errors)
