"""What a base model accepts of an adapter, without its weights and without an engine."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_multilora.adapters.layout import ModelLayout
from vllm_multilora.integration.offline.model import BaseModelError, Server, offline_manager
from vllm_multilora.integration.worker.layout import running_layout

__all__ = ["BaseModelError", "offline_layout"]


def offline_layout(
    model: str,
    *,
    max_lora_rank: int = 16,
    dtype: str = "auto",
    lora_dtype: str = "auto",
    lora_target_modules: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    dora: bool = False,
) -> ModelLayout:
    """The layout of a model as a server with one worker would have it.

    Args:
        model: The base model's folder or name, as for `vllm serve`; its weights may be absent.
        max_lora_rank: As the server's flag.
        dtype: As the server's flag.
        lora_dtype: As the server's flag; `auto` is the model's dtype.
        lora_target_modules: As the server's flag; None: all that the model supports.
        trust_remote_code: As the server's flag.
        dora: As the server's `--multilora-dora`.

    Raises:
        BaseModelError: vLLM does not take the model or a setting, or has no LoRA for the model.
    """
    server = Server(
        model,
        max_lora_rank=max_lora_rank,
        dtype=dtype,
        lora_dtype=lora_dtype,
        lora_target_modules=None if lora_target_modules is None else tuple(lora_target_modules),
        trust_remote_code=trust_remote_code,
    )
    with offline_manager(server.vllm_config()) as manager:
        return running_layout(manager, dora=dora).layout
