"""Adapters' parts for layers that vLLM fills itself: embeddings, output heads, experts.

The store has read and checked their tensors, keeps them as they are in the checkpoint, and says
each module's rank and scaling. vLLM's own classes convert them to what its layers expect; they are
given the modules' names in the running model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

from vllm_multilora.adapters.model.tensor_names import parse_tensor_name
from vllm_multilora.adapters.packing.pack_index import PackIndex, RawTensor
from vllm_multilora.integration.worker.experts.uneven_experts import even_out
from vllm_multilora.store.memory.mapper import SegmentMapper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.lora.request import LoRARequest

    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

# vLLM's own checks of an adapter; which of them exist depends on the version.
_CHECKS = (
    "_validate_moe_lora_format",  # from 0.32
    "_validate_modules_to_save",  # to 0.32
    "_validate_token_classification_lora",  # to 0.32
    "_validate_classification_head_lora",  # from 0.33, for the two before
)


class SpecialParts:
    """Makes vLLM's form of the parts that packed slices leave out."""

    def __init__(self, manager: MultiLoRAModelManager, max_position_embeddings: int | None) -> None:
        self._manager = manager
        self._max_position_embeddings = max_position_embeddings

    def make(
        self,
        request: LoRARequest,
        index: PackIndex,
        memory: SegmentMapper,
        segments: Sequence[int],
    ) -> LoRAModel | None:
        """An adapter's special parts on this worker; None if there are none.

        Raises:
            ValueError: vLLM does not take them.
        """
        tensors, modules = {}, {}
        for name, raw in index.tensors.items():
            role = parse_tensor_name(name)
            if role is not None:
                module = self._manager.layout.naming.rename(role.module)
                if module is None or not self._manager.layout.is_special(module):
                    continue
                modules[module] = raw
                name = role.of(module)
            tensors[name] = _copy(raw, memory, segments)
        if not tensors:
            return None
        manager: Any = self._manager
        config = json.loads(index.config)
        config["vllm_max_position_embeddings"] = self._max_position_embeddings
        config["bias"] = "none"  # whatever was asked for, an adapter that has any is refused
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(manager.lora_config)
        special: Any = LoRAModel.from_lora_tensors(
            lora_model_id=request.lora_int_id,
            tensors=tensors,
            peft_helper=helper,
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
        )
        for module, lora in special.loras.items():
            lora.rank, lora.scaling = modules[module].rank, modules[module].scaling
            if rows := manager.repeated_rows.get(module):
                lora.lora_b = rows.for_cutting(lora.lora_b)
        # PEFT holds all experts of a layer as one, as parameters. vLLM is told so with the request,
        # which only some ways of registering an adapter can say.
        holds_as_one = any(name.endswith(".experts.base_layer") for name in special.loras)
        special.is_3d_lora_weight = request.is_3d_lora_weight or holds_as_one
        for name in _CHECKS:
            if check := getattr(manager, name, None):
                check(special)
        if special.loras:
            even_out(special, manager.packed_modules, manager.layout.linear_shapes)
            manager._create_merged_loras_inplace(special)
        return special


def _copy(raw: RawTensor, memory: SegmentMapper, segments: Sequence[int]) -> torch.Tensor:
    """A tensor of its own: vLLM scales some in place, and the pack is everybody's."""
    tensor = torch.empty(raw.shape, dtype=raw.dtype.torch)
    if tensor.numel():
        with memory.view(raw.place, tensor.nbytes, segments) as source:
            tensor.view(-1).view(torch.uint8).numpy()[:] = source
    return tensor
