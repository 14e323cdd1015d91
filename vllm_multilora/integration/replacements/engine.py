"""Replacements that act in the engine core: scheduler, requests, adapters, prefix cache.

Each function makes one replacement from vLLM's original; the ledger, `patches.py`, says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_multilora.integration import prefix_keys


def scheduler_class(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_scheduler_cls(self: Any) -> type:
        from vllm_multilora.integration.scheduler import adapter_aware

        return adapter_aware(original(self))

    return get_scheduler_cls


def pin(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def pin_lora(self: Any, lora_id: int) -> bool:
        done = original(self, lora_id)
        if done and (tell := getattr(self.scheduler, "pin_adapter", None)):
            tell(lora_id)
        return done

    return pin_lora


def remove(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def remove_lora(self: Any, lora_id: int) -> Any:
        from vllm_multilora.integration.engine_core import unregister

        return unregister(self, lora_id, original)

    return remove_lora


def hash_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def lora_hash_keys(request: Any) -> list[Any]:
        keys = original(request)
        if not prefix_keys.tells_versions_apart:
            return keys
        return [(*key, request.lora_request.lora_int_id) for key in keys]

    return lora_hash_keys


def executor(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from vllm_multilora.integration.engine_core import starting_workers

        with starting_workers(self, vllm_config):
            original(self, vllm_config, *args, **kwargs)

    return init


def add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.engine_core import gate_of

        gate_of(self)
        return original(self, *args, **kwargs)

    return add_request


def add_lora(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> Any:
        from vllm_multilora.integration.engine_core import register

        return register(self, lora_request, original)

    return add_lora


def client_request(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def handle_client_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate = getattr(self, "multilora_gate", None)
        if gate is not None:
            gate.poll()
        return original(self, *args, **kwargs)

    return handle_client_request


def collective_rpc(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def collective_rpc(
        self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None
    ) -> Any:
        from vllm_multilora.integration import adapter_status

        if method != adapter_status.METHOD:
            return original(self, method, timeout, args, kwargs)
        return adapter_status.engine_report(self, *args)

    return collective_rpc
