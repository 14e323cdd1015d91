"""MoE expert layers: on GPUs vLLM's own kernels compute their adapters, by vLLM's own wrapper."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import LoRAConfig
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

from multilora_kernels import BatchPlan
from vllm_multilora.integration.attached import in_own_class
from vllm_multilora.integration.step.stock_kernels import step_metadata


class ExpertLayers:
    """Gives MoE layers the wrapper that vLLM would use, and that one what it reads of a step.

    A model without such layers has no such wrapper, and its steps prepare nothing for one.

    Attributes:
        token_slots: The slot of each of a step's rows, which experts on CPUs read.
    """

    plan: BatchPlan
    token_slots: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
    _metadata: Any = None

    def _pass_experts_to_stock(
        self, layers: list[Any], *args: Any, lora_config: LoRAConfig
    ) -> None:
        """Makes vLLM's own wrapper from the arguments of ours, for these layers.

        With `specialize_active_lora` its kernels look at as many adapters as there were when the
        graph was captured that a batch is given to, and vLLM counts a batch's adapters by name, and
        leaves out requests without one, which take a place too. So they look at all slots.
        """
        lora_config = copy(lora_config)
        lora_config.specialize_active_lora = False
        stock: Any = get_punica_wrapper(*args, lora_config=lora_config)
        if hasattr(stock, "token_mapping_meta"):
            self._metadata = metadata = step_metadata(self.plan)
            stock = in_own_class(stock, token_mapping_meta=property(lambda _: metadata))
            self.plan.sends_slot_runs = True
        for layer in layers:
            layer.set_mapping(stock)

    def _update_experts(self, token_slots: npt.NDArray[np.int64]) -> None:
        """Prepares a step for the expert layers, if there are any; the plan is up to date.

        The metadata travels with the plan. What is left is the flag that vLLM reads on the host.
        """
        self.token_slots = token_slots
        if self._metadata is not None:
            self._metadata.no_lora_flag_cpu[0] = not self.plan.rows
