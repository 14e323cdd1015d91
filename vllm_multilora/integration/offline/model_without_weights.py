"""A base model without its weights, wrapped for LoRA as in a worker.

vLLM builds the model, as the engine would, but on PyTorch's meta device, where tensors have shapes
and no memory; its LoRA manager then wraps the layers. Tensor parallelism needs no processes: layers
ask their group for its size when they are built, and are told a larger one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any, get_args

import torch
from pydantic import ValidationError
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.lora import MaxLoRARanks
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LoRAModelManager
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.activation import XIELU
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import supports_lora, supports_multimodal
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_multilora.adapters.model.layout import ModelLayout
from vllm_multilora.config import CONFIG_KEY
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.integration.worker.model.model_layout import running_layout
from vllm_multilora.integration.worker.rows.encoder_rows import ENCODER

ALLOWED_RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
"""What vLLM takes as `--max-lora-rank`."""


class BaseModelError(MultiLoRAError):
    """What a base model accepts, or costs, cannot be found out."""


@dataclass(frozen=True)
class ServerFlags:
    """The settings of `vllm serve` that decide what is built; each as vLLM's flag of that name."""

    model: str
    max_loras: int = 1
    max_lora_rank: int = 16
    tensor_parallel_size: int = 1
    fully_sharded_loras: bool = False
    lora_target_modules: Sequence[str] | None = None
    dtype: str = "auto"
    lora_dtype: str = "auto"
    max_model_len: int | None = None
    trust_remote_code: bool = False
    dora: bool = False  # the plugin's `--multilora-dora`

    def vllm_config(self) -> VllmConfig:
        """The engine's configuration.

        Raises:
            BaseModelError: vLLM does not take the model or a setting.
        """
        if self.max_lora_rank not in ALLOWED_RANKS:
            raise BaseModelError(
                f"max_lora_rank is {self.max_lora_rank}, but vLLM accepts only "
                f"{', '.join(map(str, ALLOWED_RANKS))}"
            )
        if self.fully_sharded_loras and self.max_lora_rank % self.tensor_parallel_size:
            raise BaseModelError(
                f"max_lora_rank is {self.max_lora_rank}, which fully sharded LoRA cannot share "
                f"between {self.tensor_parallel_size} workers: give a multiple of their number"
            )
        settings = asdict(self) | {"model": _folder(self.model)}
        if settings.pop("dora"):
            settings["additional_config"] = {CONFIG_KEY: {"dora": True}}
        if (modules := settings.pop("lora_target_modules")) is not None:
            settings["lora_target_modules"] = list(modules)
        if self.tensor_parallel_size > 1:
            # Named, so that vLLM does not count this machine's GPUs.
            settings["distributed_executor_backend"] = "mp"
        try:
            return EngineArgs(
                enable_lora=True,
                load_format="dummy",
                skip_tokenizer_init=True,
                enforce_eager=True,
                **settings,
            ).create_engine_config()
        # Of any kind: a RuntimeError of a build for GPUs, on a machine without one; an
        # AttributeError of a config.json that is a list.
        except Exception as error:
            raise BaseModelError(
                f"vLLM cannot load the base model {self.model}: {_said(error)}"
            ) from error


def _folder(model: str) -> str:
    """The folder of a `config.json`; other folders, and names, as they are.

    Raises:
        BaseModelError: A path leads nowhere: vLLM would take it for a name on a hub.
    """
    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return str(path.parent)
    if model.startswith(("/", ".", "~")) and not path.is_dir():
        raise BaseModelError(
            f"vLLM cannot load the base model {model}: there is no such folder; expected one "
            "with a config.json, the path of that file, or a model's name"
        )
    return model


def _said(error: Exception) -> str:
    """The error's message in one line, without what pydantic puts around it.

    Models assert that they have no LoRA, without a message: that line of theirs says it.
    """
    said = str(error) or f"{type(error).__name__}: {extract_tb(error.__traceback__)[-1].line}"
    if isinstance(error, ValidationError):
        said = "; ".join(part["msg"].removeprefix("Value error, ") for part in error.errors())
    return " ".join(said.split())


@contextmanager
def offline_manager(config: VllmConfig) -> Iterator[LoRAModelManager]:
    """A LoRA manager of the first worker's part of the model, without weights or kernels.

    Within the context, vLLM's layers find the process groups and the configuration they ask for.

    Raises:
        BaseModelError: vLLM has no LoRA for the model.
    """
    workers = config.parallel_config.tensor_parallel_size
    dtype: Any = config.model_config.dtype  # a torch.dtype by now
    scheduler: Any = config.scheduler_config
    with set_current_vllm_config(config), one_worker(of=workers):
        with (
            set_default_torch_dtype(dtype),
            torch.device("meta"),
            _own_rotary_embeddings(),
            _numbers(),
        ):
            try:
                model = initialize_model(config)
            except Exception as error:  # whatever a model's own code meets in a configuration
                raise BaseModelError(
                    f"vLLM cannot build the base model {config.model_config.model}: {_said(error)}"
                ) from error
        give_experts_kernels(model)
        if not supports_lora(model):
            raise BaseModelError(f"vLLM does not support LoRA for {type(model).__name__}")
        yield _UnrunnableManager(
            model=model,  # type: ignore[arg-type]
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            vocab_size=config.model_config.get_vocab_size(),
            lora_config=config.lora_config,  # type: ignore[arg-type]
            device=torch.device("cpu"),
            vllm_config=config,
        )


def offline_layout(server: ServerFlags) -> ModelLayout:
    """What a model accepts of an adapter, as the first worker has it; raises as `vllm_config`."""
    with offline_manager(server.vllm_config()) as manager:
        return running_layout(manager, dora=server.dora).layout


class _UnrunnableManager(LoRAModelManager):
    """Wraps layers only; without kernels, which may not be there for this machine."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        model: Any = self.model
        self.supports_mm = supports_multimodal(model) and hasattr(model, "get_mm_mapping")
        parts = [DEFAULT_LANGUAGE_WRAPPER_KEY]
        if self.supports_mm:
            self.mm_mapping = model.get_mm_mapping()
            parts = self.mm_mapping.language_model[:1]
        if vllm_config.model_config.is_encoder_decoder:
            parts = [*parts, ENCODER]
        nothing: Any = object()
        self.punica_wrapper_mapping = dict.fromkeys(parts, nothing)


def give_experts_kernels(model: torch.nn.Module) -> None:
    """Gives MoE layers a kernel that LoRA can wrap, where they have none.

    vLLM chooses their kernel when it has loaded the weights, and has none with LoRA for CPUs. What
    is chosen does not change what the slots are; that there is one is asked when they are made.
    """
    for runner in model.modules():
        if not isinstance(runner, MoERunner):
            continue
        from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
        from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
        from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
        from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
            MoEPrepareAndFinalizeNoDPEPModular,
        )

        method = runner.routed_experts.quant_method
        experts = TritonExperts(runner.moe_config, FUSED_MOE_UNQUANTIZED_CONFIG)
        method.moe_quant_config = FUSED_MOE_UNQUANTIZED_CONFIG
        method.moe_kernel = FusedMoEKernel(MoEPrepareAndFinalizeNoDPEPModular(), experts)


@contextmanager
def _own_rotary_embeddings() -> Iterator[None]:
    """Keeps embeddings without memory out of the cache that all models of a process share."""
    cache = rotary_embedding._ROPE_DICT
    of_others = dict(cache)
    cache.clear()
    try:
        yield
    finally:
        cache.clear()
        cache.update(of_others)


@contextmanager
def _numbers() -> Iterator[None]:
    """Gives memory to the few numbers that a layer reads back while it is made (Apertus')."""
    made = XIELU.__init__

    def make(self: XIELU, *args: Any, **settings: Any) -> None:
        with torch.device("cpu"):
            made(self, *args, **settings)

    XIELU.__init__ = make  # type: ignore[method-assign]
    try:
        yield
    finally:
        XIELU.__init__ = made  # type: ignore[method-assign]


@contextmanager
def one_worker(*, of: int = 1) -> Iterator[None]:
    """Process groups of one process; that for tensor parallelism says that it is the first `of`."""
    with ExitStack() as stack:
        if not parallel_state.model_parallel_is_initialized():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            meeting = f"file://{Path(folder) / 'rendezvous'}"
            parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
            stack.callback(parallel_state.destroy_distributed_environment)
            stack.callback(parallel_state.destroy_model_parallel)
            parallel_state.ensure_model_parallel_initialized(1, 1)
        group = parallel_state.get_tp_group()
        size, group.world_size = group.world_size, of
        try:
            yield
        finally:
            group.world_size = size
