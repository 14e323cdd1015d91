"""The routes that this plugin adds to vLLM's application, behind vLLM's own checks."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.routing import APIRoute

from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.gateway.names import models_list
from vllm_multilora.gateway.status import page
from vllm_multilora.gateway.status.status_route import AdaptersRoute
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.requests import metrics_route

_LOADING = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def add_routes(server: FastAPI, access: Access | None) -> None:
    """Adds all of them.

    Args:
        server: vLLM's application, with its own routes.
        access: Whose keys the server knows; None where it has none.
    """
    AdaptersRoute(access).add_to(server)
    page.add_route(server)
    models_list.add_route(server)
    metrics_route.add_routes(server)
    for route in [*server.router.routes]:
        if isinstance(route, APIRoute) and route.path in _LOADING:
            _describe(server, route)


def _describe(server: FastAPI, route: APIRoute) -> None:
    """Puts in a route's place one whose answers `/openapi.json` describes as they are here."""
    server.router.routes.remove(route)
    server.add_api_route(
        route.path,
        route.endpoint,
        methods=[*route.methods],
        dependencies=route.dependencies,
        responses={**route.responses, **registration.REFUSALS},
    )
