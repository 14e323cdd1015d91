"""Blends as requests carry them: several adapters with a weight each, as one `LoRARequest`.

    lora = blended([(LoRARequest("style", 1, "/adapters/style"), 0.7),
                    (LoRARequest("domain", 2, "/adapters/domain"), 0.5)])
    llm.generate(prompts, params, lora_request=lora)

To vLLM and most of this package, such a request is like any other: it has a name, a number and, in
place of a folder, a text that says what is blended (`adapters.blend`).
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.blend import Blend, BlendError, BlendPart, is_blend
from vllm_multilora.metrics.label_values import BLENDS


def blended(parts: Iterable[tuple[LoRARequest, float]]) -> LoRARequest:
    """The adapter that is the weighted sum of some adapters.

    Equal to PEFT's `add_weighted_adapter(..., combination_type="cat")`. The same adapters with the
    same weights make the same blend, in whatever order they come.

    Args:
        parts: One to eight adapters, each with a finite weight of at most 100 in magnitude. They
            need not be loaded. With `load_inplace` of any, the files of all are looked at again.

    Returns:
        To be used as any other; its number and name follow from the parts.

    Raises:
        ValueError: Too many parts, one that comes twice or is a blend itself, or a wrong weight.
    """
    found = list(parts)
    for lora, _ in found:
        if is_blend(lora.lora_path):
            raise ValueError(f"found the blend {lora.lora_name!r} as a part, expected an adapter")
    blend = Blend.of(
        BlendPart(lora.lora_int_id, lora.lora_name, lora.lora_path, weight)
        for lora, weight in found
    )
    reload = any(lora.load_inplace for lora, _ in found)
    return LoRARequest(blend.name, blend.number, blend.source, load_inplace=reload)


def blend_of(lora: LoRARequest) -> Blend | None:
    """What a request's adapter is blended of; None if it is none."""
    try:
        return Blend.read(lora.lora_path)
    except BlendError:  # made by hand: the store refuses it, and says why
        return None


def label_of(lora: LoRARequest) -> str:
    """What metrics call a request's adapter: its name, or one name for all blends."""
    return BLENDS if is_blend(lora.lora_path) else lora.lora_name
