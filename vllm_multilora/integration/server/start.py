"""What an API server does when it starts: its engine can be reached, no request has come."""

from __future__ import annotations

import os
from typing import Any

from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.failed_requests import RefusalsInOneLine
from vllm_multilora.integration.logs import PrintableLines, add_filter
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS
from vllm_multilora.integration.server.names import (
    adapter_directory,
    registration,
    routes,
    shared_names,
)
from vllm_multilora.integration.server.names.public_names import separate
from vllm_multilora.integration.server.requests import engine_calls, metering, metrics_route
from vllm_multilora.integration.server.requests.callers import current_tenant
from vllm_multilora.integration.server.settings.gateway_activation import is_active_behind
from vllm_multilora.tenants.keys import ADMIN_KEY_VARIABLE, has_keys, key_in
from vllm_multilora.tenants.work_turns import take_turns

_FILTERS = (RefusalsInOneLine(), PrintableLines())
"""Of what vLLM logs in an API server, the first that acts first."""
_GUARDS = ("flag-values", "engine-door")


def require_guards(models: Any) -> None:
    """Stops a server with keys that lacks a patch that enforces them.

    Raises:
        ConfigError: This vLLM lacks what a guard replaces.
    """
    # Where the plugin does not act, `check_access` has seen whether there is anything to guard.
    if not is_active_behind(models.engine_client):
        return
    settings = settings_of(models.engine_client.vllm_config)
    if not has_keys(settings) and not key_in(os.environ):
        return
    if lacking := GATEWAY_SEAMS.missing(_GUARDS):
        raise ConfigError(
            f"--multilora-tenants, --multilora-admin-key-file and {ADMIN_KEY_VARIABLE} cannot be "
            f"enforced with this vLLM, which lacks what the patches {', '.join(lacking)} need: "
            f"install a version that vllm-multilora supports"
        )


def share_threads(renderer: Any) -> None:
    """Lets tenants take turns where vLLM makes tokens of their texts.

    One thread does so unless `--renderer-num-workers` says otherwise, and takes a second for half a
    million characters.
    """
    executor = renderer._executor
    begin_again = take_turns(executor, lambda *_, **__: current_tenant() or "")
    replace = getattr(executor, "replace_inner", None)
    if replace is None:  # vLLM 0.31 has no threads that it gives up
        return

    def replace_inner() -> None:
        replace()
        begin_again()

    executor.replace_inner = replace_inner


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
    require_guards(models)
    if registration.acts_for(models):
        for lines in _FILTERS:
            add_filter(lines)
        separate(models)
        # The engines find their store and show their metrics now, not with their first request.
        await engine_calls.engine_reports(client.engine_core, [])
        registration.start(models)
        shared_names.start(models)
        metering.start(models)
        metrics_route.hide_stock_lists(client)
    if settings_of(client.vllm_config).tenants is not None:
        share_threads(client.renderer)  # also where vLLM loads the adapters
    # In this order: a folder that somebody gives a route's name is not served, and stops no server.
    routes.start(models)
    await adapter_directory.start(models)
    routes.tell_unknown(models)
