"""The routes that load and unload adapters, vLLM's and SageMaker's, in the place of vLLM's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from pydantic import Field
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from vllm_multilora.integration.server.names import registration

_ALIAS = "x-amzn-sagemaker-adapter-alias"


class _Load(LoadLoRAAdapterRequest):
    """The body of vLLM's `POST /v1/load_lora_adapter`, and which version it replaces, and how."""

    swap: Literal["in_flight"] | None = None
    expected_version: str | None = Field(default=None, pattern=r"^[0-9a-f]{8,64}$")


class _Registration(_Load):
    """The body of SageMaker's `POST /adapters`."""

    lora_name: str = Field(min_length=1, alias="name")
    lora_path: str = Field(min_length=1, alias="src")


async def _load(request: _Load, raw_request: Request) -> Response:
    return _answer(await registration.load(_models(raw_request), request))


async def load_for_others(models: Any, request: Any, *_: Any) -> ErrorResponse | str:
    """As vLLM's method, for other software's routes: some ask again after 500, not after 503."""
    answer = await registration.load(models, _Load(**request.model_dump()))
    if isinstance(answer, ErrorResponse) and answer.error.code == 503:
        return ErrorResponse(error=answer.error.model_copy(update={"code": 500}))
    return answer


async def _unload(request: UnloadLoRAAdapterRequest, raw_request: Request) -> Response:
    return _answer(await registration.unload(_models(raw_request), request))


async def _register(request: _Registration, raw_request: Request) -> Response:
    answer = await _load(request, raw_request)
    return _sagemakers(answer, request.lora_name, raw_request, "registered")


async def _unregister(adapter_name: str, raw_request: Request) -> Response:
    body = UnloadLoRAAdapterRequest(lora_name=adapter_name)
    return _sagemakers(await _unload(body, raw_request), adapter_name, raw_request, "unregistered")


_ENDPOINTS: dict[str, Callable[..., Any]] = {
    "/v1/load_lora_adapter": _load,
    "/v1/unload_lora_adapter": _unload,
    "/adapters": _register,
    "/adapters/{adapter_name}": _unregister,
}


def add_routes(server: FastAPI) -> None:
    """Puts the routes in the place of vLLM's, of which a server may have none."""
    for route in [*server.router.routes]:
        if isinstance(route, APIRoute) and route.path in _ENDPOINTS:
            server.router.routes.remove(route)
            server.add_api_route(
                route.path,
                _ENDPOINTS[route.path],
                name=route.name,
                methods=[*route.methods],
                dependencies=route.dependencies,
                responses={**route.responses, **registration.REFUSALS},
            )


def _models(raw_request: Request) -> Any:
    return raw_request.app.state.openai_serving_models


def _answer(result: ErrorResponse | str) -> Response:
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), result.error.code)
    return Response(result)


def _sagemakers(answer: Response, name: str, raw_request: Request, done: str) -> Response:
    if answer.status_code != 200:
        return answer
    return Response(f"Adapter {raw_request.headers.get(_ALIAS) or name} {done}")
