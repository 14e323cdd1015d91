"""MoE expert layers: on GPUs vLLM's own kernels compute their adapters."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.config import LoRAConfig
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

from multilora_kernels import BatchPlan
from vllm_multilora.integration.step.stock_kernels import step_metadata


class ExpertLayers:
    """What MoE layers ask of a punica wrapper, passed on to the wrapper that vLLM would use.

    A model without such layers has no such wrapper, and its steps prepare nothing for one.

    Attributes:
        token_slots: The slot of each of a step's rows, which experts on CPUs read.
    """

    plan: BatchPlan
    token_slots: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
    _stock: PunicaWrapperBase | None = None

    def _pass_experts_to_stock(self, *args: Any, lora_config: LoRAConfig) -> None:
        """Makes vLLM's own wrapper from the arguments of ours.

        With `specialize_active_lora` its kernels look at as many adapters as there were when the
        graph was captured that a batch is given to, and vLLM counts a batch's adapters by name, and
        leaves out requests without one, which take a place too. So they look at all slots.
        """
        if self._stock is None:
            lora_config = copy(lora_config)
            lora_config.specialize_active_lora = False
            self._stock = get_punica_wrapper(*args, lora_config=lora_config)
            if hasattr(self._stock, "token_mapping_meta"):
                self._stock.token_mapping_meta = step_metadata(self.plan)
                self.plan.sends_slot_runs = True

    def _update_experts(self, token_slots: npt.NDArray[np.int64]) -> None:
        """Prepares a step for the expert layers, if there are any; the plan is up to date.

        The metadata travels with the plan. What is left is the flag that vLLM reads on the host.
        """
        self.token_slots = token_slots
        meta = getattr(self._stock, "token_mapping_meta", None)
        if meta is not None:
            meta.no_lora_flag_cpu[0] = not self.plan.rows

    @property
    def token_mapping_meta(self) -> Any:
        """The metadata of vLLM's own wrapper over a step's tokens; expert layers read it directly.

        Raises:
            AttributeError: There is none, because no expert layer uses this wrapper.
        """
        return self._stock_wrapper().token_mapping_meta  # type: ignore[attr-defined]

    def moe_lora_align_block_size(self, *args: Any, **kwargs: Any) -> Any:
        """See vLLM's `PunicaWrapperGPU`, as for all that follow."""
        return self._stock_wrapper().moe_lora_align_block_size(*args, **kwargs)

    def add_lora_fused_moe(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock_wrapper().add_lora_fused_moe(*args, **kwargs)

    def add_lora_w13(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock_wrapper().add_lora_w13(*args, **kwargs)

    def add_lora_w2(self, *args: Any, **kwargs: Any) -> Any:
        return self._stock_wrapper().add_lora_w2(*args, **kwargs)

    def _stock_wrapper(self) -> PunicaWrapperBase:
        if self._stock is None:
            raise AttributeError(
                "this punica wrapper was given no expert layers: adopt_layers() must name every "
                "layer that uses it, before the first step"
            )
        return self._stock
