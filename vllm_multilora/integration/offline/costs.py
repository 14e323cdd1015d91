"""What a base model costs on one worker, without its weights, a GPU or an engine.

vLLM's own layers allocate their slots on the meta device. That is done for one slot and for two,
and for every rank: a further slot always adds the same, which is not so for ranks (fully sharded
layers split them, tables have none).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.config.vllm import get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

from multilora_kernels.dtypes import of_torch
from multilora_kernels.packs.scatter import STAGING_BYTES
from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.integration.offline.base_model import (
    BaseModel,
    KvCache,
    LayerMemory,
    SlotMemory,
)
from vllm_multilora.integration.offline.model_without_weights import (
    ALLOWED_RANKS,
    BaseModelError,
    ServerFlags,
    offline_manager,
)
from vllm_multilora.integration.patching.activation import kernel_backend, loads_adapters
from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper
from vllm_multilora.integration.worker.model.model_layout import is_ranked, running_layout
from vllm_multilora.integration.worker.model.output_factors import SlotFactors
from vllm_multilora.integration.worker.slots.slot_buffers import layer_bytes, wrapper_bytes

if TYPE_CHECKING:
    from vllm.lora.model_manager import LoRAModelManager

# In vLLM 0.33 it has a module of its own.
_GROUPING = "vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils"
_get_kv_cache_groups: Any = next(
    import_module(name) for name in _GROUPING if find_spec(name)
).get_kv_cache_groups

_RANK_TABLE_BYTES = 2 * torch.int32.itemsize  # a shrink rank and an expand rank


def offline_costs(server: ServerFlags) -> BaseModel:
    """What the first worker of a server would allocate.

    Raises:
        BaseModelError: vLLM does not take the model or a setting, or has no LoRA for the model.
    """
    config = server.vllm_config()
    lora_config: Any = config.lora_config
    model_config: Any = config.model_config
    workers = server.tensor_parallel_size
    sharing = workers if server.fully_sharded_loras else 1
    with offline_manager(config) as manager:
        if not manager.modules:
            requested = " ".join(server.lora_target_modules or ())
            raise BaseModelError(
                f"the base model {server.model} has no layer for --lora-target-modules "
                f"{requested}: expected some of {', '.join(sorted(manager.supported_lora_modules))}"
            )
        model: torch.nn.Module = manager.model
        weights = [*model.parameters(), *model.buffers()]
        by_rank: dict[int, SlotMemory] = {}
        layouts: dict[int, ModelLayout] = {}
        for rank in ALLOWED_RANKS:
            if rank % sharing == 0:
                by_rank[rank], layouts[rank] = _slots_of_rank(manager, config, rank, server.dora)
        return BaseModel(
            name=server.model,
            architecture=type(model).__name__,
            dtype=of_torch(model_config.dtype).name,
            lora_dtype=of_torch(lora_config.lora_dtype).name,
            tensor_parallel_size=workers,
            fully_sharded=server.fully_sharded_loras,
            weight_bytes=sum(tensor.nbytes for tensor in weights),
            utilization=config.cache_config.gpu_memory_utilization,
            kv_cache=_kv_cache(config),
            by_rank=by_rank,
            layouts=layouts,
            staging_bytes=STAGING_BYTES if loads_adapters(config) else 0,
        )


def _slots_of_rank(
    manager: LoRAModelManager, config: VllmConfig, rank: int, dora: bool
) -> tuple[SlotMemory, ModelLayout]:
    two = _allocate(manager, 2, rank)
    wrapper_of_two = _wrapper_bytes(manager, config)
    one = _allocate(manager, 1, rank)
    wrapper = _wrapper_bytes(manager, config)
    found = running_layout(manager, dora=dora)
    layers = tuple(
        _memory(name, one[name], two[name], manager.packed_modules.get(name, (name,)))
        for name in manager.modules
    )
    tables: list[LayerMemory] = []
    if wrapper:
        rows = len(found.layout.slices) + sum(
            getattr(layer, "n_slices", 1) for layer in found.special.values() if is_ranked(layer)
        )
        tables = [
            LayerMemory("true ranks (plugin)", (), rows * _RANK_TABLE_BYTES),
            _memory("batch plans (plugin)", wrapper, wrapper_of_two),
        ]
    if wrapper and dora:
        of_one, of_two = (
            SlotFactors(found.packed.values(), slots, "meta").nbytes for slots in (1, 2)
        )
        tables.append(_memory("DoRA factors (plugin)", of_one, of_two))
    dtype: Any = manager.lora_config.lora_dtype
    special = sum(layer_bytes(layer, dtype) for layer in found.special.values())
    largest = found.layout.largest_bytes() + special
    return SlotMemory(layers, tuple(tables), largest), found.layout


def _memory(name: str, one: int, two: int, modules: Iterable[str] = ()) -> LayerMemory:
    """What a layer or table allocates, from its bytes with one slot and with two."""
    return LayerMemory(name, tuple(modules), slot_bytes=two - one, fixed_bytes=2 * one - two)


def _allocate(manager: LoRAModelManager, slots: int, rank: int) -> dict[str, int]:
    """Has every layer allocate its slots anew; the bytes of each."""
    lora_config: Any = copy.copy(manager.lora_config)
    lora_config.max_loras, lora_config.max_lora_rank = slots, rank
    manager.lora_config = lora_config
    model: Any = manager.model
    for layer in manager.modules.values():
        layer.create_lora_weights(slots, lora_config, model.config)
    return {name: layer_bytes(layer) for name, layer in manager.modules.items()}


def _wrapper_bytes(manager: LoRAModelManager, config: VllmConfig) -> int:
    """Bytes of the plugin's buffers for a step; 0 where vLLM's own kernels would run."""
    backend = kernel_backend(config)
    if backend == "vllm":
        return 0
    wrapper = MultiLoRAPunicaWrapper(
        manager.max_num_batched_tokens,
        manager.max_num_seqs,
        "cpu",
        backend=backend,
        lora_config=manager.lora_config,
    )
    return wrapper_bytes(wrapper)


def _kv_cache(config: VllmConfig) -> KvCache | None:
    """What requests take, by the specifications that vLLM's attention layers give.

    vLLM puts layers of one kind into groups of one size, and a group that is not full takes as much
    as one that is: a block is as large as the largest group's layers need.
    """
    current_platform.update_block_size_for_backend(config)
    kind: Any = AttentionLayerBase
    specs = {
        name: spec
        for name, layer in get_layers_from_vllm_config(config, kind).items()
        # Layers that read another layer's cache have none of their own.
        if getattr(layer, "kv_sharing_target_layer_name", None) is None
        and (spec := layer.get_kv_cache_spec(config)) is not None
    }
    if not specs:
        return None
    layouts = get_supported_kv_cache_layouts(get_current_attn_backends(config))
    resolve_kv_cache_layout(config, [[layout.name for layout in layouts]], specs.values())
    groups = _get_kv_cache_groups(config, specs)
    if not groups:  # as of encoders
        return None
    block = max(_block_bytes(group) for group in groups)
    blocks = sum(
        -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
        for spec in (group.kv_cache_spec for group in groups)
    )
    model_config: Any = config.model_config
    return KvCache(block * blocks, model_config.max_model_len)


def _block_bytes(group: KVCacheGroupSpec) -> int:
    """What a block takes in all layers of a group."""
    spec = group.kv_cache_spec
    layers = 1 if isinstance(spec, UniformTypeKVCacheSpecs) else len(group.layer_names)
    return spec.page_size_bytes * layers
