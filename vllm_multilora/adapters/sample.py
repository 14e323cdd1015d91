"""A small adapter of a usual kind, and the layout of the model that it is for."""

from __future__ import annotations

import json
from pathlib import Path

from multilora_kernels.dtypes import BFLOAT16
from vllm_multilora.adapters.folder import CONFIG_NAME, TENSORS_NAME
from vllm_multilora.adapters.layout import ModelLayout, SliceLayout

_LAYERS, _HIDDEN, _KEYS, _RANK = 4, 64, 32, 4
_OUTPUTS = {"q_proj": _HIDDEN, "k_proj": _KEYS, "v_proj": _KEYS, "o_proj": _HIDDEN}


def write_sample(folder: Path) -> ModelLayout:
    """Writes the adapter's two files, with weights of 0, and returns the model's layout."""
    slices: list[SliceLayout] = []
    header: dict[str, object] = {}
    end = 0
    for layer in range(_LAYERS):
        for projection, outputs in _OUTPUTS.items():
            name = f"model.layers.{layer}.self_attn.{projection}"
            slices.append(
                SliceLayout(name, len(slices), _HIDDEN, outputs, (0, _HIDDEN), (0, outputs))
            )
            for part, shape in (("A", (_RANK, _HIDDEN)), ("B", (outputs, _RANK))):
                begin, end = end, end + shape[0] * shape[1] * BFLOAT16.itemsize
                header[f"base_model.model.{name}.lora_{part}.weight"] = {
                    "dtype": "BF16",
                    "shape": shape,
                    "data_offsets": (begin, end),
                }
    config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": [*_OUTPUTS],
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    text = json.dumps(header).encode()
    (folder / TENSORS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
    return ModelLayout(tuple(slices), _RANK, BFLOAT16, columns_first=True)
