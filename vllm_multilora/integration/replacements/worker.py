"""Replacements that act in the workers: adapters of a step, kernels, sleep.

Each function makes one replacement from vLLM's original; the ledger, `patches.py`, says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def punica(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_punica_wrapper(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        from vllm_multilora.integration.activation import kernel_backend

        backend = kernel_backend(get_current_vllm_config())
        if backend == "vllm":
            return original(*args, **kwargs)
        from vllm_multilora.integration.punica import MultiLoRAPunicaWrapper

        return MultiLoRAPunicaWrapper(*args, backend=backend, **kwargs)

    return get_punica_wrapper


def worker_manager(original: type) -> Callable[..., Any]:
    @functools.wraps(original, updated=())
    def make_worker_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.activation import kernel_backend
        from vllm_multilora.integration.patches import PUNICA_WRAPPER

        # Our manager fills slots for our kernels; stock ones need stock's cleared slots.
        if kernel_backend(vllm_config) == "vllm" or not PUNICA_WRAPPER.is_applied():
            return original(vllm_config, *args, **kwargs)
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        return MultiLoRAWorkerManager(vllm_config, *args, **kwargs)

    return make_worker_manager


def set_active_loras(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_active_loras(
        self: Any,
        input_batch: Any,
        num_scheduled_tokens: Any,
        num_sampled_tokens: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if isinstance(manager, MultiLoRAWorkerManager):
            manager.activate_batch(
                input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs
            )
        else:
            original(self, input_batch, num_scheduled_tokens, num_sampled_tokens, *args, **kwargs)

    return set_active_loras


def prompt_logprobs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_prompt_logprobs(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if not isinstance(manager, MultiLoRAWorkerManager):
            return original(self, hidden_states, *args, **kwargs)
        with manager.model_manager.rows_from_prompts(hidden_states):
            return original(self, hidden_states, *args, **kwargs)

    return get_prompt_logprobs


def prompt_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compute(self: Any, logits_fn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_multilora.integration.model_manager import MultiLoRAModelManager

        manager = getattr(getattr(logits_fn, "__self__", None), "lora_manager", None)
        if not isinstance(manager, MultiLoRAModelManager):
            return original(self, logits_fn, hidden_states, *args, **kwargs)
        with manager.rows_from_prompts(hidden_states):
            return original(self, logits_fn, hidden_states, *args, **kwargs)

    return compute


def sample(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sample(self: Any, hidden_states: Any, input_batch: Any, *args: Any, **kwargs: Any) -> Any:
        import numpy as np

        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        manager = getattr(self, "lora_manager", None)
        if isinstance(manager, MultiLoRAWorkerManager):
            manager.model_manager.set_sampled_rows(np.diff(input_batch.cu_num_logits_np))
        return original(self, hidden_states, input_batch, *args, **kwargs)

    return sample


def lora_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make_lora_inputs(
        self: Any, req_ids: list[str], idx_mapping: Any, num_scheduled_tokens: Any
    ) -> tuple[Any, Any, Any]:
        from vllm.lora.layers.utils import LoRAMappingType

        from vllm_multilora.integration.mapping import BatchMapping

        mapping = BatchMapping(
            self.lora_ids[idx_mapping], num_scheduled_tokens, None, LoRAMappingType.LANGUAGE
        )
        return mapping, mapping, self.get_activate_loras(req_ids)

    return make_lora_inputs


def set_active_loras_from_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_active_loras(
        self: Any, prompts: Any, tokens: Any, requests: Any, *args: Any, **kwargs: Any
    ) -> None:
        from vllm_multilora.integration.mapping import BatchMapping
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        if isinstance(prompts, BatchMapping):
            manager = getattr(self, "lora_manager", None)
            if isinstance(manager, MultiLoRAWorkerManager):
                manager.set_active_adapters(requests, prompts)
                return
            prompts, tokens = prompts.prompt_mapping, prompts.index_mapping
        original(self, prompts, tokens, requests, *args, **kwargs)

    return set_active_loras


def lora_ids(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        import numpy as np

        original(self, *args, **kwargs)
        self.lora_ids = self.lora_ids.astype(np.int64)

    return init


def wake_up(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wake_up(self: Any, tags: list[str] | None = None) -> None:
        from vllm_multilora.integration.worker_manager import MultiLoRAWorkerManager

        original(self, tags)
        manager = getattr(self.model_runner, "lora_manager", None)
        if isinstance(manager, MultiLoRAWorkerManager) and (tags is None or "weights" in tags):
            manager.slots_lost()

    return wake_up
