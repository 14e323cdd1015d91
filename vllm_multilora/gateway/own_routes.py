"""The routes that this plugin adds to vLLM's application, behind vLLM's own checks."""

from __future__ import annotations

from fastapi import FastAPI

from vllm_multilora.gateway.keys.access import Access
from vllm_multilora.gateway.names import models_list
from vllm_multilora.gateway.status import page
from vllm_multilora.gateway.status.status_route import AdaptersRoute
from vllm_multilora.integration.server.names import registration_routes
from vllm_multilora.integration.server.requests import metrics_route


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
    registration_routes.add_routes(server)
