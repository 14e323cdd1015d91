"""Replacements that act where requests come in: flags, settings, and the API server.

Each function makes one replacement from vLLM's original; the ledger, `patches.py`, says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def flags(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        from vllm_multilora.integration.flags import add_flags

        parser = original(parser)
        add_flags(parser)
        return parser

    return add_cli_args


def from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: type, args: Any) -> Any:
        from vllm_multilora.integration.flags import merge_flags

        engine_args = original(cls, args)
        merge_flags(args, engine_args)
        return engine_args

    return from_cli_args


def engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.adapters.directory import require_directories
        from vllm_multilora.integration.activation import (
            announce,
            is_active,
            kernel_backend,
            settings_of,
        )
        from vllm_multilora.integration.cache_settings import (
            check_cache_settings,
            lift_default_count,
        )
        from vllm_multilora.integration.metrics import make_folder
        from vllm_multilora.integration.route_settings import check_routes

        vllm_config = original(self, *args, **kwargs)
        usage_context = args[0] if args else kwargs.get("usage_context")
        announce(vllm_config)
        if kernel_backend(vllm_config) != "vllm":
            check_cache_settings(settings_of(vllm_config), vllm_config)
            require_directories(settings_of(vllm_config).adapter_dir)
            lift_default_count(self, vllm_config)
            # Whoever starts no engine with it, and only looks, names no use of a configuration.
            if usage_context is not None and not self.disable_log_stats:
                make_folder(vllm_config)
        if is_active(vllm_config):
            check_routes(settings_of(vllm_config), self, usage_context)
        return vllm_config

    return create_engine_config


def load_route(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def load_lora_adapter(self: Any, request: Any, base_model_name: str | None = None) -> Any:
        from vllm_multilora.integration import registration

        if registration.acts_for(self):
            return await registration.load_adapter(self, request, base_model_name)
        return await original(self, request, base_model_name)

    return load_lora_adapter


def unload_route(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def unload_lora_adapter(self: Any, request: Any) -> Any:
        from vllm_multilora.integration import registration

        if registration.acts_for(self):
            return await registration.unload_adapter(self, request)
        return await original(self, request)

    return unload_lora_adapter


def server_start(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def init_static_loras(self: Any) -> None:
        from vllm_multilora.integration import server_start

        await original(self)
        await server_start.start(self)

    return init_static_loras


def model_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        from vllm_multilora.integration import model_names

        refusal = await model_names.prepare(self, request)
        return refusal if refusal is not None else await original(self, request)

    return check_model


def pooling_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def check_model(self: Any, request: Any) -> Any:
        from vllm_multilora.integration import model_names

        await model_names.prepare_or_raise(self, request)
        return await original(self, request)

    return check_model


def models_list(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        routes = getattr(self, "multilora_routes", None)
        if routes is not None:
            models.data.extend(await routes.cards())
        return models

    return show_available_models


def registration_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def check_load_request(self: Any, request: Any) -> Any:
        from vllm_multilora.integration.routes import name_taken

        refusal = await original(self, request)
        return refusal if refusal is not None else name_taken(self, request.lora_name)

    return check_load_request


def middleware(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init_entrypoints_middleware(args: Any, app: Any, *rest: Any, **kwargs: Any) -> None:
        from vllm_multilora.integration.routed_calls import RoutedCallMiddleware, asks_for_routes

        original(args, app, *rest, **kwargs)
        if asks_for_routes(args):
            app.add_middleware(RoutedCallMiddleware)

    return init_entrypoints_middleware


def outputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.failures import deliver_failures

        deliver_failures(engine_core_outputs, self.request_states)
        return original(self, engine_core_outputs, *args, **kwargs)

    return process_outputs


def status_route(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attach_router(app: Any) -> None:
        from vllm_multilora.integration.status_route import add_route

        original(app)
        add_route(app)

    return attach_router


def stat_loggers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_multilora.integration.metrics import show

        original(self, vllm_config, *args, **kwargs)
        show(vllm_config)

    return init


def multiprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def collect(self: Any) -> Any:
        from vllm_multilora.integration.metrics import shown_beside

        return [*original(self), *shown_beside(self)]

    return collect
