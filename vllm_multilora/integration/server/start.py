"""What an API server does when it starts: its engine can be reached, no request has come."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm_multilora.integration.api_server.equal_loads import LOADER
from vllm_multilora.integration.failed_requests import RefusalsInOneLine
from vllm_multilora.integration.logs import PrintableLines, add_filter
from vllm_multilora.integration.server.names import (
    adapter_directory,
    preload,
    registration,
    routes,
    shared_names,
)
from vllm_multilora.integration.server.names.public_names import public_names, separate
from vllm_multilora.integration.server.names.registration_routes import load_for_others
from vllm_multilora.integration.server.names.sources import source_names
from vllm_multilora.integration.server.requests import (
    engine_admission,
    engine_calls,
    metering,
    metrics_route,
)
from vllm_multilora.integration.server.settings.gateway_activation import is_active_behind


async def start(models: Any) -> None:
    """Starts serving adapters: directories, routes, and names that several servers share.

    Args:
        models: vLLM's table of models, with the adapters of `--lora-modules`.

    Raises:
        MultiLoRAError: A setting or a file that one names cannot be used.
    """
    client: Any = getattr(models, "engine_client", None)
    if not is_active_behind(client):
        return
    engine_admission.follow(client.output_processor)
    metering.end_all_at_shutdown(client)
    if registration.acts_for(models):
        add_filter(RefusalsInOneLine())  # acts before the other one
        add_filter(PrintableLines())
        separate(models)
        # The engines find their store and show their metrics now, not with their first request.
        await engine_calls.engine_reports(client.engine_core, [])
        loaded = public_names(models).values()  # by vLLM, which knows no versions
        await asyncio.gather(*(engine_calls.register(client, lora) for lora in loaded))
        LOADER.set(models, load_for_others)
        registration.start(models)
        shared_names.start(models)
        metering.start(models)
        metrics_route.hide_stock_lists(client)
    # In this order: a folder that somebody gives a route's name is not served, and stops no server.
    routes.start(models)
    await adapter_directory.start(models)
    source_names.start(models)
    if (served := routes.ROUTES.get(models)) is not None:
        served.tell_unknown()
    preload.start(models)
