"""Routes of trainers beside vLLM's own, as their servers add them to vLLM's application.

Replayed, since their packages need GPUs: the same calls to vLLM, in the same order.
"""

from collections.abc import Awaitable, Callable

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest
from vllm.lora.request import LoRARequest


async def answer(request: Request, others: Callable[[Request], Awaitable[Response]]) -> Response:
    """For `--middleware`: answers the trainers' calls."""
    route = {
        "/load_lora_adapter": load_as_prime_rl,
        "/skyrl/v1/load_lora_adapter": load_as_skyrl,
        "/areal_rename": rename_as_areal,
    }.get(request.url.path)
    if route is None:
        return await others(request)
    body = await request.json()
    return await route(request.app.state.openai_serving_models, **body)


async def load_as_prime_rl(models, lora_name: str, lora_path: str) -> Response:
    """One name for all versions, loaded by vLLM's method and marked in vLLM's table."""
    request = LoadLoRAAdapterRequest(lora_name=lora_name, lora_path=lora_path, load_inplace=True)
    response = await models.load_lora_adapter(request)
    stored = models.lora_requests.get(lora_name)
    if stored is not None:
        stored.load_inplace = False
    if isinstance(response, ErrorResponse):
        return JSONResponse(response.model_dump(), response.error.code)
    return JSONResponse({"status": "ok"})


async def load_as_skyrl(models, lora_name: str, lora_path: str) -> Response:
    """One number for all versions, loaded by the engine's client and put into vLLM's table."""
    async with models.lora_resolver_lock[lora_name]:
        known = models.lora_requests.get(lora_name)
        number = models.lora_id_counter.inc(1) if known is None else known.lora_int_id
        lora = LoRARequest(lora_name, number, lora_path, load_inplace=True)
        await models.engine_client.add_lora(lora)
        lora.load_inplace = False
        models.lora_requests[lora_name] = lora
    return JSONResponse({"status": "ok", "lora_int_id": number})


async def rename_as_areal(models, lora_name: str, lora_int_id: int) -> Response:
    """At most one name for each number: a version's own name takes the place of the last one's."""
    paths = []
    for name, lora in [*models.lora_requests.items()]:
        if lora.lora_int_id == lora_int_id and name != lora_name:
            paths.append(lora.lora_path)
            del models.lora_requests[name]
    models.lora_requests[lora_name] = LoRARequest(lora_name, lora_int_id, paths[0])
    return JSONResponse({"success": True})
