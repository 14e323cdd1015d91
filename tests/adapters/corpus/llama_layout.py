"""What the tiny Llama of the serving tests accepts, written down by hand."""

from dataclasses import replace

from multilora_kernels.dtypes import FLOAT32
from vllm_multilora.adapters.model.layout import ModelLayout, SliceLayout, SpecialShape

LAYERS, HIDDEN, VOCABULARY, MAX_RANK = 3, 96, 300, 64
# Kind, inputs, outputs: 8 heads and 2 key-value heads of 32, an MLP of 176.
KINDS = (
    ("self_attn.q_proj", HIDDEN, 256),
    ("self_attn.k_proj", HIDDEN, 64),
    ("self_attn.v_proj", HIDDEN, 64),
    ("self_attn.o_proj", 256, HIDDEN),
    ("mlp.gate_proj", HIDDEN, 176),
    ("mlp.up_proj", HIDDEN, 176),
    ("mlp.down_proj", 176, HIDDEN),
)
MODULES = {
    f"model.layers.{layer}.{kind}": (inputs, outputs)
    for layer in range(LAYERS)
    for kind, inputs, outputs in KINDS
}

LAYOUT = ModelLayout(
    slices=tuple(
        SliceLayout(name, row, inputs, outputs, (0, inputs), (0, outputs))
        for row, (name, (inputs, outputs)) in enumerate(MODULES.items())
    ),
    max_rank=MAX_RANK,
    dtype=FLOAT32,
    columns_first=True,
    special=frozenset({"model.embed_tokens", "lm_head"}),
    special_shapes={
        "model.embed_tokens": SpecialShape(VOCABULARY, HIDDEN, embedding=True),
        "lm_head": SpecialShape(HIDDEN, VOCABULARY, embedding=False),
    },
    tied=True,
    vocabulary=VOCABULARY,
)

DORA_LAYOUT = replace(LAYOUT, dora=True)
"""The same with `--multilora-dora`."""
