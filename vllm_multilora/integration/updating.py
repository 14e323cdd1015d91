"""Lets several API servers change their adapters, which vLLM rejects at start.

vLLM checks its environment variable in the process that starts the API servers. The variable is
removed there, and restored in the API servers when they load their plugins;
`server.names.shared_names` does the actual work.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm_multilora.integration.patching.activation import settings_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SERVER_VARIABLE = "MULTILORA_SERVER"
"""Tells the API servers of one `vllm serve` what their server is called."""

UPDATING_VARIABLE = "MULTILORA_RUNTIME_UPDATING"
"""Set while vLLM starts several API servers in place of its own variable."""

_STOCK_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def allow_updating(vllm_config: VllmConfig) -> None:
    """In the process that starts several API servers: takes vLLM's variable away."""
    parallel = vllm_config.parallel_config
    if parallel._api_process_count <= 1 or parallel._api_process_rank >= 0:
        return
    os.environ[SERVER_VARIABLE] = vllm_config.instance_id
    if settings_of(vllm_config).store == "process" and _STOCK_VARIABLE in os.environ:
        os.environ[UPDATING_VARIABLE] = os.environ.pop(_STOCK_VARIABLE)


def restore_updating() -> None:
    """In a process that was started in between: vLLM's variable is as the operator has set it."""
    if (value := os.environ.get(UPDATING_VARIABLE)) is not None:
        os.environ[_STOCK_VARIABLE] = value
