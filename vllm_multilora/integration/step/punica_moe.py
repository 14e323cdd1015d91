"""MoE expert layers: their adapters are computed by vLLM's own kernels."""

from __future__ import annotations

from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import LoRAConfig
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper


class ExpertLayers:
    """What MoE layers ask of a punica wrapper, passed on to the wrapper that vLLM would use.

    A model without such layers has no such wrapper, and its steps prepare nothing for one.
    """

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

    def _update_experts(self, token_slots: npt.NDArray[np.int64]) -> None:
        """Prepares a step for the expert layers, if there are any.

        vLLM sorts and counts the tokens' slots on the device and waits for the results. The same
        function does so on the host if the slots are there, and then only copies.
        """
        meta = getattr(self._stock, "token_mapping_meta", None)
        if meta is not None:
            meta.prepare_tensors(torch.from_numpy(token_slots))

    def _experts_memory_lost(self) -> None:
        """No token has an adapter until a step says so: graphs read padding rows' slots too."""
        meta = getattr(self._stock, "token_mapping_meta", None)
        if meta is not None:
            meta.token_lora_mapping.fill_(-1)

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
