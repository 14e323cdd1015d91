"""What a base model accepts of an adapter, without its weights and without an engine."""

from __future__ import annotations

from vllm_multilora.adapters.layout import ModelLayout
from vllm_multilora.integration.offline.model import Server, offline_manager
from vllm_multilora.integration.worker.layout import running_layout


def offline_layout(server: Server) -> ModelLayout:
    """The layout of a model as the first worker of a server has it.

    Args:
        server: Its settings; `max_loras` does not matter.

    Raises:
        BaseModelError: vLLM does not take the model or a setting, or has no LoRA for the model.
    """
    with offline_manager(server.vllm_config()) as manager:
        return running_layout(manager, dora=server.dora).layout
