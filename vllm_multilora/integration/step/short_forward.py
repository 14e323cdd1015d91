"""A LoRA layer's forward in one function, for processors where Python's overhead matters.

vLLM's LoRA layers look up some twenty attributes through `nn.Module` and go through four methods
before they call the punica wrapper, which on a CPU takes as long as a small adapter's product. For
a layer on one rank without a second stream, all that is needed is the base layer's product, the
adapters' products as they were prepared, and the bias that the layer passes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm import envs
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod

from vllm_multilora.integration.attached import in_own_class

if TYPE_CHECKING:
    import torch

_FORWARDS = (ColumnParallelLinearWithLoRA.forward, RowParallelLinearWithLoRA.forward)


def with_short_forward(layer: BaseLayerWithLoRA) -> BaseLayerWithLoRA:
    """A layer with the short forward, if vLLM's does the same; after its mapping is set.

    Layers that are sharded, use a second stream, call a forward of their base layer's own, or are
    of other kinds keep vLLM's.

    Args:
        layer: Any LoRA layer. Its slots, its punica wrapper and its base layer's method must not be
            replaced afterwards.

    Returns:
        The layer in a class of its own; itself, if it keeps vLLM's.
    """
    if not isinstance(layer, BaseLinearLayerWithLoRA) or not _does_the_same(layer):
        return layer
    base: Any = layer.base_layer
    hands_on_bias, returns_bias = base.skip_bias_add, base.return_bias
    parameters = base._parameters  # a look-up of `base.bias` ends in Python, after all others
    # On CPUs vLLM's plain method does no more than call this, in a roundabout way.
    is_plain = type(base.quant_method) is UnquantizedLinearMethod and hasattr(base, "cpu_linear")
    wrapper: Any = layer.punica_wrapper
    add_adapters = wrapper.linear(layer.lora_a_stacked, layer.lora_b_stacked)
    plan = wrapper.plan

    def forward(input_: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        bias = parameters["bias"]
        added = None if hands_on_bias else bias
        if is_plain:
            y: torch.Tensor = base.cpu_linear(input_, parameters["weight"], added)
        else:
            y = base.quant_method.apply(base, input_, added)
        if y.ndim == 2:
            add_adapters(y, input_, plan)
        else:
            add_adapters(y.view(-1, y.shape[-1]), input_.reshape(-1, input_.shape[-1]), plan)
        return (y, bias if hands_on_bias else None) if returns_bias else y

    return in_own_class(layer, forward=staticmethod(forward))


def _does_the_same(layer: BaseLinearLayerWithLoRA) -> bool:
    kind, base_kind = type(layer), type(layer.base_layer)
    plain = kind.apply is BaseLinearLayerWithLoRA.apply or (
        kind.apply is MergedColumnParallelLinearWithLoRA.apply
        and base_kind.forward is ColumnParallelLinear.forward
    )
    return (
        plain
        and kind.forward in _FORWARDS
        and layer.tp_size == 1
        and "bias" in layer.base_layer._parameters
        and not envs.VLLM_LORA_ENABLE_DUAL_STREAM
    )
