"""`GET /v1/lora_adapters`: every adapter, where it is, and what became of it.

Read-only, so it needs no VLLM_ALLOW_RUNTIME_LORA_UPDATING; vLLM's `--api-key` guards it as it
guards all of `/v1`. Where the plugin does not act, it answers as an unknown path does.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse

from vllm_multilora.integration import registration
from vllm_multilora.integration.adapter_status import METHOD, Report, listing

PATH = "/v1/lora_adapters"

TIME_LIMIT_S = 30.0
"""A call waits for the engine's running step, which ends much sooner."""


def add_route(app: FastAPI) -> None:
    """Adds the route to vLLM's application."""
    app.add_api_route(PATH, show_adapters, methods=["GET"])


async def show_adapters(raw_request: Request) -> JSONResponse:
    """The adapters of all engines behind this server."""
    models = getattr(raw_request.app.state, "openai_serving_models", None)
    if models is None or not registration.acts_for(models):
        raise HTTPException(HTTPStatus.NOT_FOUND)
    registered = list(models.lora_requests.values())
    asked = [lora.lora_int_id for lora in registered]
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            reports = await _reports(models.engine_client.engine_core, asked)
    except TimeoutError as error:
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            f"the engine did not answer within {TIME_LIMIT_S:.0f} s",
        ) from error
    if not reports:
        raise HTTPException(HTTPStatus.NOT_FOUND)
    return JSONResponse(listing(reports, registered))


async def _reports(client: Any, asked: list[int]) -> list[Report]:
    """One report of each engine; vLLM's own `collective_rpc` returns the first engine's alone."""
    answers = await asyncio.gather(
        *(
            client._call_utility_async(
                "collective_rpc", METHOD, None, (asked,), None, engine=engine
            )
            for engine in client.core_engines
        )
    )
    return [report for answer in answers for report in answer]
