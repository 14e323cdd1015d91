"""What a base model accepts of an adapter, found without its weights and without an engine.

vLLM builds the model, as the engine would, but on PyTorch's meta device, where tensors have shapes
and no memory; its LoRA manager then wraps the layers, and the layout is read off as in a worker.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LoRAModelManager
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import supports_lora, supports_multimodal
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_multilora.adapters.layout import ModelLayout
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.layout import running_layout


class BaseModelError(MultiLoRAError):
    """The base model's layout cannot be found out."""


def offline_layout(
    model: str,
    *,
    max_lora_rank: int = 16,
    dtype: str = "auto",
    lora_dtype: str = "auto",
    trust_remote_code: bool = False,
) -> ModelLayout:
    """The layout of a model as a server with one worker would have it.

    Args:
        model: The base model's folder or name, as for `vllm serve`; its weights may be absent.
        max_lora_rank: As the server's flag.
        dtype: As the server's flag.
        lora_dtype: As the server's flag; `auto` is the model's dtype.
        trust_remote_code: As the server's flag.

    Raises:
        BaseModelError: vLLM does not take the model or a setting, or has no LoRA for the model.
    """
    try:
        config = EngineArgs(
            model=model,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=max_lora_rank,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            lora_dtype=lora_dtype,
            trust_remote_code=trust_remote_code,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
        ).create_engine_config()
    except (ValueError, OSError) as error:
        raise BaseModelError(f"vLLM does not take the base model {model}: {error}") from error
    with set_current_vllm_config(config), _one_worker():
        return running_layout(_wrapped(config), columns_first=True).layout


def _wrapped(config: VllmConfig) -> LoRAModelManager:
    """A manager of the model without weights."""
    dtype: Any = config.model_config.dtype  # a torch.dtype by now
    with set_default_torch_dtype(dtype), torch.device("meta"), _own_rotary_embeddings():
        model = initialize_model(config)
    if not supports_lora(model):
        raise BaseModelError(f"vLLM has no LoRA for {type(model).__name__}")
    scheduler: Any = config.scheduler_config
    return _UnrunnableManager(
        model=model,  # type: ignore[arg-type]
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        vocab_size=config.model_config.get_vocab_size(),
        lora_config=config.lora_config,  # type: ignore[arg-type]
        device=torch.device("cpu"),
        vllm_config=config,
    )


class _UnrunnableManager(LoRAModelManager):
    """Wraps layers only; without kernels, which may not be there for this machine."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        model: Any = self.model
        self.supports_mm = supports_multimodal(model) and hasattr(model, "get_mm_mapping")
        key = DEFAULT_LANGUAGE_WRAPPER_KEY
        if self.supports_mm:
            self.supports_tower_connector_lora = False
            self.mm_mapping = model.get_mm_mapping()
            key = self.mm_mapping.language_model[0]
        nothing: Any = object()
        self.punica_wrapper_mapping = {key: nothing}


@contextmanager
def _own_rotary_embeddings() -> Iterator[None]:
    """Keeps embeddings without memory out of the cache that all models of a process share."""
    cache = rotary_embedding._ROPE_DICT
    of_others = dict(cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        cache.update(of_others)


@contextmanager
def _one_worker() -> Iterator[None]:
    """Process groups of one process, which vLLM's layers ask for their sizes."""
    if parallel_state.model_parallel_is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'rendezvous'}"
        parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
        try:
            parallel_state.ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
