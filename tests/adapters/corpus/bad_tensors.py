"""Adapters whose tensors do not fit the base model, the configuration or each other."""

import torch
from torch import zeros

from vllm_multilora.adapters.problems import Code

from .cases import Change, add_bad
from .draft import (
    CONFIG,
    DOWN2,
    PREFIX,
    Q0,
    V1,
    WEIGHTS,
    Draft,
    add_embedding,
    add_head,
    all_tensors,
    edited,
    good,
    name_of,
    set_rank,
    with_value,
)
from .llama_layout import HIDDEN, VOCABULARY

A, B = name_of(Q0, "A"), name_of(Q0, "B")
SHAPE, HALF, UNKNOWN = Code.WRONG_SHAPE, Code.HALF_MISSING, Code.UNKNOWN_TENSOR
RANK, NOT_FINITE = Code.RANK_NOT_AS_CONFIGURED, Code.NOT_FINITE
EMBEDDING = f"{PREFIX}model.embed_tokens.lora_embedding_"
NAN = float("nan")


def embedding(tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Change:
    """A good embedding beside the linear modules, and then a change."""

    def change(draft: Draft) -> None:
        add_embedding(draft)
        edited(tensors, **config)(draft)

    return change


def head(tensors: dict[str, torch.Tensor]) -> Change:
    """A good head beside the linear modules, and then a change."""

    def change(draft: Draft) -> None:
        add_head(draft)
        edited(tensors)(draft)

    return change


def pair(module: str, outputs: int) -> dict[str, torch.Tensor | None]:
    return {name_of(module, "A"): zeros(8, 96), name_of(module, "B"): zeros(outputs, 8)}


def wide(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every shape is wrong, all for one reason."""
    return {n: zeros([128 if s == HIDDEN else s for s in t.shape]) for n, t in tensors.items()}


def renamed(*replacements: tuple[str, str]) -> Change:
    def change(name: str) -> str:
        for old, new in replacements:
            name = name.replace(old, new)
        return name

    return lambda draft: draft.rename(change)


def a_layer_too_many(draft: Draft) -> None:
    for name, tensor in list(draft.tensors.items()):
        if "layers.2." in name:
            draft.tensors[name.replace("layers.2.", "layers.3.")] = tensor.clone()


def by_kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        flat = f"lora_te_{module.replace('.', '_')}"
        found[f"{flat}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(16.0)
    return found


def as_embedding(draft: Draft, module: str) -> None:
    for part in "AB":
        values = draft.tensors.pop(name_of(module, part))
        draft.tensors[f"{PREFIX}{module}.lora_embedding_{part}"] = values


def head_as_embedding(draft: Draft) -> None:
    add_head(draft)
    as_embedding(draft, "lm_head")


def nan_in(dtype: torch.dtype) -> Change:
    def change(draft: Draft) -> None:
        draft.tensors = {n: t.to(dtype) for n, t in draft.tensors.items()}
        draft.tensors[A][0, 0] = NAN

    return change


def overflowing(_: Draft) -> Draft:
    changed = good([Q0], lora_alpha=8e10)
    changed.tensors[B][0, 0] = 1e30
    return changed


def wrong_in_four_ways(draft: Draft) -> None:
    edited({B: None, name_of(V1, "A"): zeros(8, 95)}, use_dora=True)(draft)
    draft.tensors[name_of(DOWN2, "A")][0, 0] = NAN


MERGED = "model.layers.0.self_attn.qkv_proj"
PARTS = [name_of(f"model.layers.0.self_attn.{k}_proj", part) for k in "qkv" for part in "AB"]

add_bad(
    CONFIG,
    {
        "wrong-in-four-ways": (
            wrong_in_four_ways,
            *((Code.UNSUPPORTED_FEATURE, HALF, SHAPE, NOT_FINITE), "use_dora"),
        ),
    },
)
add_bad(
    WEIGHTS,
    {
        # PEFT would apply it to the head as well.
        "embedding-without-the-head-that-is-tied-to-it": (
            embedding(ensure_weight_tying=True),
            *(HALF, "of the embedding alone", "the output head, too"),
        ),
    },
    is_right_untied=True,
)
add_bad(
    WEIGHTS,
    {
        "no-tensors": (
            all_tensors(lambda _: {}),
            *(Code.NO_LORA_TENSORS, "no lora_A and no lora_B", "a LoRA adapter"),
        ),
        "b-missing": (edited({B: None}), HALF, A, "without its lora_B"),
        "every-b-missing": (
            all_tensors(lambda tensors: {n: t for n, t in tensors.items() if ".lora_A." in n}),
            *(HALF, "without its lora_B", "20 more like this"),
        ),
        "rank-of-the-configuration-another": (
            edited(r=16),
            *(RANK, "rank 8, expected 16", "20 more like this"),
        ),
        "rank-of-one-module-another": (
            lambda draft: set_rank(draft, V1, 4),
            *(RANK, name_of(V1, "A"), "rank 4, expected 8"),
        ),
        "rank-pattern-that-the-tensors-contradict": (
            edited(rank_pattern={"q_proj": 4}),
            *(RANK, "q_proj", "rank 8, expected 4"),
        ),
        "rank-of-one-module-over-the-limit": (
            lambda draft: set_rank(draft, Q0, 96),
            *((RANK, Code.RANK_TOO_LARGE), A, "rank 96, expected 8"),
        ),
        "ranks-of-a-and-b-differ": (
            edited({B: zeros(256, 4)}),
            *(Code.RANKS_DIFFER, B, "rank 4, expected 8, as lora_A"),
        ),
        "a-too-narrow": (edited({A: zeros(8, 95)}), SHAPE, A, "[8, 95]", "[8, 96]", "96 inputs"),
        "b-too-short": (edited({B: zeros(128, 8)}), SHAPE, B, "[128, 8]", "256 outputs"),
        "a-transposed": (edited({A: zeros(96, 8)}), SHAPE, A, "[96, 8]", "[8, 96]"),
        "a-flat": (edited({A: zeros(768)}), SHAPE, A, "[768]", "two dimensions"),
        "another-base-model": (
            all_tensors(wide, base_model_name_or_path="other/model-128"),
            *(SHAPE, "more like this", "'other/model-128'", "served base model"),
        ),
        "a-without-rows": (
            edited({A: zeros(0, 96)}),
            *(Code.EMPTY_TENSOR, A, "no elements (shape [0, 96])"),
        ),
        # As saved from a sharded model, all of whose parameters are elsewhere.
        "tensors-not-gathered": (
            all_tensors(lambda tensors: {name: zeros(0) for name in tensors}),
            *(Code.EMPTY_TENSOR, "no elements (shape [0])", "41 more like this"),
        ),
        "a-of-integers": (
            edited({A: zeros(8, 96, dtype=torch.int8)}),
            *(Code.WRONG_DTYPE, A, "int8", "float32"),
        ),
        "weights-of-eight-bits": (
            all_tensors(lambda found: {n: t.to(torch.float8_e4m3fn) for n, t in found.items()}),
            *(Code.WRONG_DTYPE, "float8_e4m3fn", "41 more like this"),
        ),
        "module-that-the-base-lacks": (
            edited(pair("model.rotary", 96)),
            *(Code.UNKNOWN_MODULE, "rotary", "q_proj", "embed_tokens"),
        ),
        "a-layer-too-many": (
            a_layer_too_many,
            *(Code.LAYER_OUT_OF_RANGE, "layers.3.", "layer 3", "from 0 to 2"),
        ),
        "layers-of-the-end-of-a-deeper-model": (
            renamed(("layers.", "layers.3")),
            *(Code.LAYER_OUT_OF_RANGE, "for layer 3", "from 0 to 2", "41 more like this"),
        ),
        "modules-of-another-architecture": (
            renamed(("model.layers.", "transformer.h."), ("_proj", "_fc")),
            *(Code.NO_MATCHING_MODULES, "transformer.h.", "none of the 42", "model.layers.0"),
        ),
        # PEFT leaves them out, and says nothing.
        "modules-that-are-no-targets": (
            lambda draft: draft.config["target_modules"].remove("k_proj"),
            *(UNKNOWN, "k_proj.lora_A", "'target_modules'", "leaves out", "5 more like"),
        ),
        "modules-that-an-expression-leaves-out": (
            edited(target_modules=r".*\.self_attn\..*"),
            *(UNKNOWN, "mlp.", "'target_modules'", "17 more like"),
        ),
        "layers-that-are-not-to-be-transformed": (
            edited(layers_to_transform=[0, 2], layers_pattern="layers"),
            *(UNKNOWN, "layers.1.", "'layers_to_transform'", "13 more like"),
        ),
        "a-module-that-is-excluded": (
            edited(exclude_modules=["norm", "layers.0.self_attn.q_proj"]),
            *(UNKNOWN, Q0, "'exclude_modules'", "1 more like"),
        ),
        "q-k-and-v-merged": (
            edited(dict.fromkeys(PARTS) | pair(MERGED, 256 + 64 + 64)),
            *(Code.MERGED_MODULE, "qkv_proj", "q_proj, k_proj, v_proj"),
        ),
        "gate-and-up-merged": (
            edited(pair("model.layers.1.mlp.gate_up_proj", 352)),
            *(Code.MERGED_MODULE, "gate_up_proj", "gate_proj, up_proj, which are adapted one by"),
        ),
        "magnitudes-without-dora": (
            edited({f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(256)}),
            *(UNKNOWN, "lora_magnitude_vector", "a magnitude of DoRA"),
        ),
        "biases-trained": (
            edited({f"{PREFIX}{Q0}.bias": zeros(256)}, bias="all"),
            *(Code.UNSUPPORTED_FEATURE, f"{Q0}.bias", "'bias': 'none'"),
        ),
        "a-bias-that-the-configuration-denies": (
            edited({f"{PREFIX}{Q0}.bias": zeros(256)}),
            *(UNKNOWN, f"{Q0}.bias", "a bias of the base model"),
        ),
        "a-full-weight": (
            edited({f"{PREFIX}model.norm.weight": torch.ones(96)}),
            *(UNKNOWN, "norm.weight", "a full weight"),
        ),
        "the-base-model-instead": (
            all_tensors(
                lambda tensors: {
                    n.replace(".lora_A", ""): zeros(8, 8) for n in tensors if "_A" in n
                }
            ),
            *(UNKNOWN, "_proj.weight", "a full weight", "20 more like this"),
        ),
        "tensors-named-by-mlx": (
            lambda draft: draft.rename(
                lambda name: name.removeprefix(PREFIX).removesuffix(".weight").lower()
            ),
            *(UNKNOWN, "lora_a", "as MLX-LM names it", "41 more like this"),
        ),
        "tensors-named-by-kohya": (
            all_tensors(by_kohya),
            *(UNKNOWN, "lora_te_model", "kohya's scripts and ComfyUI", "62 more"),
        ),
        "tensors-named-by-nemo": (
            renamed((".lora_A.", ".adapter.linear_in."), (".lora_B.", ".adapter.linear_out.")),
            *(UNKNOWN, "linear_in", "as NeMo and Megatron Bridge name it"),
        ),
        "a-tensor-twice": (
            edited({f"{PREFIX}{Q0}.lora_A.default.weight": zeros(8, 96)}),
            *(Code.DUPLICATE_TENSOR, Q0, "one lora_A"),
        ),
        "a-linear-module-as-embedding": (
            lambda draft: as_embedding(draft, Q0),
            *(UNKNOWN, "lora_embedding_A", "is no embedding"),
        ),
        "a-head-as-embedding": (
            head_as_embedding,
            *(UNKNOWN, "lora_embedding_A", "is no embedding"),
        ),
        "embedding-of-a-larger-vocabulary": (
            embedding({f"{EMBEDDING}A": zeros(8, 320)}),
            *(Code.WRONG_VOCABULARY, "lora_embedding_A", "[8, 320]", "a vocabulary of 300"),
        ),
        "embedding-of-another-width": (
            embedding({f"{EMBEDDING}B": zeros(64, 8)}),
            *(SHAPE, "lora_embedding_B", "[64, 8]", "[96, 8]"),
        ),
        "head-of-a-smaller-vocabulary": (
            head({name_of("lm_head", "B"): zeros(VOCABULARY - 1, 8)}),
            *(Code.WRONG_VOCABULARY, "lm_head.lora_B", "[299, 8]", "a vocabulary of 300"),
        ),
        "head-of-another-width": (
            head({name_of("lm_head", "A"): zeros(8, 128)}),
            *(SHAPE, "lm_head.lora_A", "[8, 128]", "[8, 96]"),
        ),
        "a-with-one-nan": (
            with_value(A, (2, 5), NAN),
            *(NOT_FINITE, A, "1 of 768 values", "the first at [2, 5]"),
        ),
        "the-last-value-infinite": (
            with_value(name_of(DOWN2, "B"), (-1, -1), float("-inf")),
            *(NOT_FINITE, name_of(DOWN2, "B"), "the first at [95, 7]"),
        ),
        "all-values-nan": (
            all_tensors(lambda found: {n: torch.full_like(t, NAN) for n, t in found.items()}),
            *(NOT_FINITE, "NaN or infinite", "41 more like this"),
        ),
        "a-nan-in-bfloat16": (nan_in(torch.bfloat16), NOT_FINITE, A, "values NaN or infinite"),
        "a-nan-in-float16": (nan_in(torch.float16), NOT_FINITE, A, "values NaN or infinite"),
        "values-that-overflow-once-scaled": (
            overflowing,
            *(Code.OVERFLOW, B, "times the scaling 1e+10", "float32"),
        ),
    },
)
