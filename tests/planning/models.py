"""A small base model as planning sees it, over the modules of the adapters' tests."""

from dataclasses import replace

import torch

from tests.adapters.checkpoints import MODULES, layout
from vllm_multilora.integration.offline.base_model import (
    BaseModel,
    KvCache,
    LayerMemory,
    SlotMemory,
)

RANKS = (8, 16, 32, 64)
HEAD_WIDTHS = 1000


def slots(rank: int) -> SlotMemory:
    """A layer's slot takes 2 bytes a rank and width; the head, 2 bytes a rank and 1,000."""
    layers = tuple(LayerMemory(n, (n,), 2 * rank * (a + b)) for n, a, b in MODULES)
    head = LayerMemory("lm_head", ("lm_head",), 2 * rank * HEAD_WIDTHS, fixed_bytes=8)
    tables = (LayerMemory("true ranks (plugin)", (), 48),)
    return SlotMemory(rank, (*layers, head), tables, largest_adapter=1000 * rank)


MODEL = BaseModel(
    name="tiny/model",
    architecture="TinyForCausalLM",
    dtype="bfloat16",
    lora_dtype="bfloat16",
    tensor_parallel_size=1,
    fully_sharded=False,
    weight_bytes=2**30,
    utilization=0.5,
    kv_cache=KvCache(request_bytes=100 * 64, model_len=100),
    by_rank={rank: slots(rank) for rank in RANKS},
    layouts={rank: layout(torch.bfloat16, max_rank=rank) for rank in RANKS},
)
TWO_WORKERS = replace(MODEL, tensor_parallel_size=2)
