"""vLLM's classification heads with LoRA, under the same names in all versions."""

from __future__ import annotations

from typing import Any

from vllm.lora import layers

# Until 0.32 there is one kind, whose rows are requests; 0.33 adds one whose rows are tokens.
ClassificationHead: Any = getattr(
    layers, "BaseClassificationHeadWithLoRA", layers.ClassificationHeadWithLoRA
)
TokenHead: Any = getattr(layers, "TokenClassificationHeadWithLoRA", ())  # (): nothing is one
