"""vLLM's own LoRA kernels as contenders in the kernels' benchmark and work counter.

On a GPU they run as vLLM runs them. Without one, vLLM puts placeholders in Triton's place, and
its kernels cannot run at all. In Triton's interpreter (TRITON_INTERPRET=1) copies of vLLM's
kernel modules are executed here with the real Triton; vLLM's own modules stay as they are.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from vllm.lora.ops.triton_ops import LoRAKernelMeta
from vllm.lora.ops.triton_ops import utils as pointer_tables
from vllm.lora.utils import get_captured_lora_counts
from vllm.triton_utils import HAS_TRITON

from multilora_kernels import TritonUnavailableError, triton_availability
from tools.kernels.measure.batches import LayerBatch
from tools.kernels.measure.contenders import ContenderUnavailableError

_PACKAGE = "vllm.lora.ops.triton_ops"
_DTYPES = (torch.float16, torch.bfloat16)


class StockKernels:
    """The two launches, and the buffer between them, of vLLM's punica wrapper for GPUs.

    Args:
        specialized: Start programs for as many adapters as the batch has (rounded up to a power
            of two), and not for as many as there are slots: vLLM's option
            `specialize_active_lora`, off by default there.
    """

    def __init__(self, *, specialized: bool = False) -> None:
        self._specialized = specialized
        self.name = "vllm (specialized)" if specialized else "vllm"

    @classmethod
    def contenders(cls) -> tuple[StockKernels, ...]:
        """The kernels as vLLM starts them by default, and with the option."""
        return cls(), cls(specialized=True)

    def prepare(self, batch: LayerBatch) -> Callable[[], None]:
        """See `tools.kernels.measure.contenders.Contender`."""
        found = operators(batch.x.device.type)
        if batch.x.dtype not in _DTYPES:
            raise ContenderUnavailableError(
                f"vLLM's kernels compute float16 and bfloat16, not {batch.x.dtype}"
            )
        tokens, max_loras = len(batch.token_slots), batch.spec.max_loras
        device = batch.x.device
        metadata = LoRAKernelMeta.make(
            max_loras, tokens, device, get_captured_lora_counts(max_loras, self._specialized)
        )
        metadata.prepare_tensors(torch.from_numpy(batch.token_slots).to(device, torch.int32))
        return _Call(
            found,
            batch,
            metadata.meta_args(tokens, self._specialized),
            _describe_weights(batch),
        )


@dataclass(frozen=True)
class _Call:
    """One layer, as `PunicaWrapperGPU.add_lora_linear` computes it.

    Attributes:
        operators: What it is computed with.
        batch: The layer and the step.
        metadata: What the operators want to know of the step.
        pointers: Device tensors that a captured graph of this call reads: kept alive by it.
    """

    operators: Operators
    batch: LayerBatch
    metadata: tuple[torch.Tensor, ...]
    pointers: tuple[Any, ...]

    def __call__(self) -> None:
        batch = self.batch
        shape = len(batch.lora_a), batch.x.size(0), batch.spec.max_rank
        buffer = torch.empty(shape, dtype=torch.float32, device=batch.x.device)
        self.operators.shrink(batch.x, batch.lora_a, buffer, *self.metadata, 1.0)
        self.operators.expand(
            buffer, batch.lora_b, batch.y, *self.metadata, offset_start=0, add_inputs=True
        )


def _describe_weights(batch: LayerBatch) -> tuple[Any, ...]:
    """Fills vLLM's tables of weight pointers, as its profiling run does before serving.

    They are looked up by address and never emptied, which suits a server but not batches that
    come and go: they would keep weights in memory, or describe others that lay there before.

    Returns:
        What the tables hold for the batch.
    """
    pointer_tables._LORA_A_PTR_DICT.clear()
    pointer_tables._LORA_B_PTR_DICT.clear()
    return (
        pointer_tables._get_lora_a_ptr(list(batch.lora_a), batch.x.device),
        pointer_tables._get_lora_b_ptr(list(batch.lora_b), 0, batch.x.device),
    )


@dataclass(frozen=True)
class Operators:
    """The two operators that vLLM's layers call.

    Attributes:
        shrink, expand: As `torch.ops.vllm.lora_shrink` and `lora_expand`.
    """

    shrink: Callable[..., None]
    expand: Callable[..., None]


@lru_cache
def operators(device_type: str) -> Operators:
    """The operators that vLLM registered, or their interpreted copies for CPU tensors."""
    if device_type != "cpu":
        if not HAS_TRITON:
            raise ContenderUnavailableError("vLLM finds no usable Triton here")
        return Operators(torch.ops.vllm.lora_shrink, torch.ops.vllm.lora_expand)
    try:
        triton_availability.require(device_type)
    except TritonUnavailableError as error:
        raise ContenderUnavailableError(str(error)) from error
    return _interpreted_operators()


def _interpreted_operators() -> Operators:
    import triton
    import triton.language as tl

    stand_ins = {
        "vllm.triton_utils": _module("vllm.triton_utils", triton=triton, tl=tl),
        # The operators' names are taken by vLLM's own modules: the copies register nothing.
        "vllm.utils.torch_utils": _module(
            "vllm.utils.torch_utils", direct_register_custom_op=lambda **_: None
        ),
    }
    with _in_place_of_modules(stand_ins):
        products = _copy(f"{_PACKAGE}.kernel_utils")
        with _in_place_of_modules({products.__name__: products}):
            shrink = _copy(f"{_PACKAGE}.lora_shrink_op")
            expand = _copy(f"{_PACKAGE}.lora_expand_op")
    return Operators(shrink._lora_shrink, expand._lora_expand)


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def _copy(name: str) -> ModuleType:
    """Executes an imported module's source once more, as a module of its own."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} has no source that could be executed")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _in_place_of_modules(modules: dict[str, ModuleType]) -> Iterator[None]:
    """What is imported meanwhile gets these modules; all of them must have been imported."""
    originals = {name: sys.modules[name] for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        sys.modules.update(originals)
