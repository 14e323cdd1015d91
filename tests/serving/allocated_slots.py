"""The LoRA buffers that vLLM really allocates for tiny models, with memory, on the CPU."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_COMMON = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 176,
    "vocab_size": 300,  # padded to 320 by vLLM
    "max_position_embeddings": 256,
    "torch_dtype": "bfloat16",
}

# What is special about each, for the sizes of slots.
CONFIGS = {
    # Grouped-query attention; adapters on the embedding and the output head.
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    # Biases, tied embeddings; a head's size follows from the hidden size.
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "tie_word_embeddings": True,
    },
    # One key-value head, which two workers both hold.
    "gemma": {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    | {"num_key_value_heads": 1},
    # Experts, and a router.
    "mixtral": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    | {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Experts whose gate and up projections adapters hold as one.
    "gpt-oss": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_scaling": None}
    | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
}


@dataclass(frozen=True)
class Setting:
    """What a server would be started with."""

    max_loras: int
    max_lora_rank: int
    tensor_parallel_size: int = 1
    fully_sharded_loras: bool = False
    lora_dtype: str = "auto"
    lora_target_modules: tuple[str, ...] | None = None
    dora: bool = False

    def __str__(self) -> str:
        sharded = ", fully sharded" if self.fully_sharded_loras else ""
        targets = f", {self.lora_target_modules}" if self.lora_target_modules else ""
        dora = ", DoRA" if self.dora else ""
        return (
            f"{self.max_loras} x {self.max_lora_rank}, TP {self.tensor_parallel_size}{sharded}, "
            f"{self.lora_dtype}{targets}{dora}"
        )


@dataclass(frozen=True)
class Allocated:
    """What a worker's manager holds; bytes.

    Attributes:
        lora: Of vLLM's layers, every tensor named and counted here.
        all: As the running server reports it, with the plugin's tables.
        largest_adapter: Host bytes of the largest adapter.
        parameters: Of the base model.
    """

    lora: int
    all: int
    largest_adapter: int
    parameters: int


def write_configs(folder: Path) -> None:
    """A folder per model with nothing but its config.json."""
    for name, config in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(_COMMON | config))


@contextmanager
def real_manager(
    folder: Path,
    setting: Setting,
    groups: Callable[[], Any],
    own: Mapping[str, str] | None = None,
    **lora: bool,
) -> Iterator[Any]:
    """A worker's LoRA manager over a model with memory, within the process groups of a context.

    Args:
        folder: Of the model's config.json.
        setting: What a server would be started with.
        groups: A context with the process groups of one worker.
        own: The plugin's own settings.
        **lora: More of vLLM's settings for LoRA.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_multilora.config import CONFIG_KEY
    from vllm_multilora.integration.offline.model_without_weights import (
        ServerFlags,
        give_experts_kernels,
    )
    from vllm_multilora.integration.worker.slots.model_manager import MultiLoRAModelManager

    config = ServerFlags(str(folder), **vars(setting)).vllm_config()
    if own is not None:
        config.additional_config = {CONFIG_KEY: own}
    for name, value in lora.items():
        setattr(config.lora_config, name, value)
    with set_current_vllm_config(config), groups():
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
        # On the CPU, vLLM has no kernel for experts with LoRA and refuses to wrap them.
        give_experts_kernels(model)
        scheduler = config.scheduler_config
        yield MultiLoRAModelManager(
            model=model,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            vocab_size=config.model_config.get_vocab_size(),
            lora_config=config.lora_config,
            device=torch.device("cpu"),
            vllm_config=config,
        )


def allocate(folder: Path, setting: Setting, groups: Callable[[], Any]) -> Allocated:
    """What a worker's manager holds."""
    with real_manager(folder, setting, groups) as manager:
        base = (*manager.model.parameters(), *manager.model.buffers())
        return Allocated(
            lora=sum(t.nbytes for m in manager.modules.values() for t in _buffers(m)),
            all=manager.allocated_bytes,
            largest_adapter=manager.layout.largest_bytes() + manager.special_slot_bytes,
            parameters=sum(tensor.nbytes for tensor in base),
        )


def _buffers(layer) -> Iterator[torch.Tensor]:
    names = ["lora_a_stacked", "lora_b_stacked"]
    if hasattr(layer, "w13_lora_a_stacked"):  # the others are views of these
        names = [f"{part}_lora_{x}_stacked" for part in ("w13", "w2") for x in "ab"]
        yield layer.adapter_enabled
    for name in names:
        stacked = getattr(layer, name)
        yield from [stacked] if isinstance(stacked, torch.Tensor) else stacked
    if getattr(layer, "sharded_to_full_mapping_gpu", None) is not None:
        yield layer.sharded_to_full_mapping_gpu


def allocate_as_one_of(
    workers: int, rank: int, meeting: Path, cases: dict[str, tuple[Path, Setting]]
) -> dict[str, Allocated]:
    """In a process of its own: one worker of a real tensor-parallel group.

    Args:
        workers: How many the group has.
        rank: This one's.
        meeting: Where they find each other. Its name is that of their shared memory as well, which
            outlives workers that were killed, so no other group may ever have had it.
        cases: What to allocate.
    """
    os.environ["VLLM_DIST_IDENT"] = meeting.name
    from vllm.distributed import parallel_state

    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    apply_patches()
    parallel_state.init_distributed_environment(workers, rank, f"file://{meeting}", rank, "gloo")

    @contextmanager
    def groups():  # those that the model at hand needs
        parallel_state.ensure_model_parallel_initialized(workers, 1)
        yield
        parallel_state.destroy_model_parallel()

    found = {case: allocate(*of, groups) for case, of in cases.items()}
    parallel_state.destroy_distributed_environment()
    return found
