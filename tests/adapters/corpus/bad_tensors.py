"""Adapters whose tensors do not fit the base model, the configuration or each other."""

import torch

from vllm_multilora.adapters.problems import Code

from .cases import bad, bad_weights
from .draft import (
    CONFIG,
    DOWN2,
    PREFIX,
    Q0,
    V1,
    Draft,
    add_embedding,
    add_head,
    good,
    name_of,
    set_rank,
)
from .llama_layout import HIDDEN, VOCABULARY

A, B = name_of(Q0, "A"), name_of(Q0, "B")


@bad_weights(Code.NO_LORA_TENSORS, words=("no lora_A and no lora_B", "a LoRA adapter"))
def no_tensors(draft: Draft) -> None:
    draft.tensors = {}


@bad_weights(Code.HALF_MISSING, words=(A, "without its lora_B"))
def b_missing(draft: Draft) -> None:
    del draft.tensors[B]


@bad_weights(Code.HALF_MISSING, words=(B, "without its lora_A"))
def a_missing(draft: Draft) -> None:
    del draft.tensors[A]


@bad_weights(Code.HALF_MISSING, words=("without its lora_B", "20 more like this"))
def every_b_missing(draft: Draft) -> None:
    draft.tensors = {n: t for n, t in draft.tensors.items() if ".lora_A." in n}


@bad_weights(Code.RANK_NOT_AS_CONFIGURED, words=("rank 8, expected 16", "20 more like this"))
def rank_of_the_configuration_another(draft: Draft) -> None:
    draft.config["r"] = 16


@bad_weights(Code.RANK_NOT_AS_CONFIGURED, words=(name_of(V1, "A"), "rank 4, expected 8"))
def rank_of_one_module_another(draft: Draft) -> None:
    set_rank(draft, V1, 4)


@bad_weights(Code.RANK_NOT_AS_CONFIGURED, words=("q_proj", "rank 8, expected 4"))
def rank_pattern_that_the_tensors_contradict(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"q_proj": 4}


@bad_weights(Code.RANK_NOT_AS_CONFIGURED, Code.RANK_TOO_LARGE, words=(A, "rank 96, expected 8"))
def rank_of_one_module_over_the_limit(draft: Draft) -> None:
    set_rank(draft, Q0, 96)


@bad_weights(Code.RANKS_DIFFER, words=(B, "rank 4, expected 8, as lora_A"))
def ranks_of_a_and_b_differ(draft: Draft) -> None:
    draft.tensors[B] = torch.zeros(256, 4)


@bad_weights(Code.WRONG_SHAPE, words=(A, "[8, 95]", "[8, 96]", "96 inputs"))
def a_too_narrow(draft: Draft) -> None:
    draft.tensors[A] = torch.zeros(8, 95)


@bad_weights(Code.WRONG_SHAPE, words=(B, "[128, 8]", "[256, 8]", "256 outputs"))
def b_too_short(draft: Draft) -> None:
    draft.tensors[B] = torch.zeros(128, 8)


@bad_weights(Code.WRONG_SHAPE, words=(B, "[512, 8]", "[256, 8]"))
def b_too_long(draft: Draft) -> None:
    draft.tensors[B] = torch.zeros(512, 8)


@bad_weights(Code.WRONG_SHAPE, words=(A, "[96, 8]", "[8, 96]"))
def a_transposed(draft: Draft) -> None:
    draft.tensors[A] = draft.tensors[A].T.contiguous()


@bad_weights(Code.WRONG_SHAPE, words=(A, "[768]", "two dimensions"))
def a_flat(draft: Draft) -> None:
    draft.tensors[A] = draft.tensors[A].reshape(-1)


@bad_weights(Code.WRONG_SHAPE, words=(A, "[1, 8, 96]", "two dimensions"))
def a_with_three_dimensions(draft: Draft) -> None:
    draft.tensors[A] = draft.tensors[A][None].clone()


@bad_weights(Code.WRONG_SHAPE, words=("more like this", "'other/model-128'", "served base model"))
def another_base_model(draft: Draft) -> None:
    """An adapter of a wider model: every shape is wrong, all for one reason."""
    for name, tensor in draft.tensors.items():
        wide = [128 if size == HIDDEN else size for size in tensor.shape]
        draft.tensors[name] = torch.zeros(wide)
    draft.config["base_model_name_or_path"] = "other/model-128"


@bad_weights(Code.EMPTY_TENSOR, words=(A, "no elements (shape [0, 96])"))
def a_without_rows(draft: Draft) -> None:
    draft.tensors[A] = torch.zeros(0, 96)


@bad_weights(Code.EMPTY_TENSOR, words=("no elements (shape [0])", "41 more like this"))
def tensors_not_gathered(draft: Draft) -> None:
    """As saved from a sharded model, all of whose parameters are elsewhere."""
    draft.tensors = {name: torch.zeros(0) for name in draft.tensors}


@bad_weights(Code.WRONG_DTYPE, words=(A, "int8", "float32"))
def a_of_integers(draft: Draft) -> None:
    draft.tensors[A] = draft.tensors[A].to(torch.int8)


@bad_weights(Code.WRONG_DTYPE, words=("float8_e4m3fn", "41 more like this"))
def weights_of_eight_bits(draft: Draft) -> None:
    draft.tensors = {n: t.to(torch.float8_e4m3fn) for n, t in draft.tensors.items()}


@bad_weights(Code.UNKNOWN_MODULE, words=("rotary", "q_proj", "embed_tokens"))
def module_that_the_base_lacks(draft: Draft) -> None:
    draft.tensors["base_model.model.model.rotary.lora_A.weight"] = torch.zeros(8, 96)
    draft.tensors["base_model.model.model.rotary.lora_B.weight"] = torch.zeros(96, 8)


@bad_weights(Code.LAYER_OUT_OF_RANGE, words=("layers.3.", "layer 3", "from 0 to 2"))
def a_layer_too_many(draft: Draft) -> None:
    for name, tensor in list(draft.tensors.items()):
        if "layers.2." in name:
            draft.tensors[name.replace("layers.2.", "layers.3.")] = tensor.clone()


@bad_weights(Code.LAYER_OUT_OF_RANGE, words=("for layer 3", "from 0 to 2", "41 more like this"))
def layers_of_the_end_of_a_deeper_model(draft: Draft) -> None:
    draft.rename(lambda name: name.replace("layers.", "layers.3"))


@bad_weights(Code.NO_MATCHING_MODULES, words=("transformer.h.", "none of the 42", "model.layers.0"))
def modules_of_another_architecture(draft: Draft) -> None:
    draft.rename(lambda n: n.replace("model.layers.", "transformer.h.").replace("_proj", "_fc"))


@bad_weights(
    Code.UNKNOWN_TENSOR, words=("k_proj.lora_A", "'target_modules'", "leaves out", "5 more like")
)
def modules_that_are_no_targets(draft: Draft) -> None:
    """PEFT leaves them out, and says nothing."""
    draft.config["target_modules"].remove("k_proj")


@bad_weights(Code.UNKNOWN_TENSOR, words=("mlp.", "'target_modules'", "17 more like"))
def modules_that_an_expression_leaves_out(draft: Draft) -> None:
    draft.config["target_modules"] = r".*\.self_attn\..*"


@bad_weights(Code.UNKNOWN_TENSOR, words=("layers.1.", "'layers_to_transform'", "13 more like"))
def layers_that_are_not_to_be_transformed(draft: Draft) -> None:
    draft.config |= {"layers_to_transform": [0, 2], "layers_pattern": "layers"}


@bad_weights(Code.UNKNOWN_TENSOR, words=(Q0, "'exclude_modules'", "1 more like"))
def a_module_that_is_excluded(draft: Draft) -> None:
    draft.config["exclude_modules"] = ["norm", "layers.0.self_attn.q_proj"]


@bad_weights(
    Code.HALF_MISSING,
    words=("of the embedding alone", "the output head, too"),
    is_right_untied=True,
)
def embedding_without_the_head_that_is_tied_to_it(draft: Draft) -> None:
    """PEFT would apply it to the head as well."""
    add_embedding(draft)
    draft.config["ensure_weight_tying"] = True


@bad_weights(Code.MERGED_MODULE, words=("qkv_proj", "q_proj, k_proj, v_proj"))
def q_k_and_v_merged(draft: Draft) -> None:
    for kind in "qkv":
        for part in "AB":
            del draft.tensors[name_of(f"model.layers.0.self_attn.{kind}_proj", part)]
    merged = "model.layers.0.self_attn.qkv_proj"
    draft.tensors[name_of(merged, "A")] = torch.zeros(8, 96)
    draft.tensors[name_of(merged, "B")] = torch.zeros(256 + 64 + 64, 8)


@bad_weights(
    Code.MERGED_MODULE,
    words=("gate_up_proj", "gate_proj, up_proj, which are adapted one by one here"),
)
def gate_and_up_merged(draft: Draft) -> None:
    merged = "model.layers.1.mlp.gate_up_proj"
    draft.tensors[name_of(merged, "A")] = torch.zeros(8, 96)
    draft.tensors[name_of(merged, "B")] = torch.zeros(352, 8)


@bad_weights(Code.UNKNOWN_TENSOR, words=("lora_magnitude_vector", "a magnitude of DoRA"))
def magnitudes_without_dora(draft: Draft) -> None:
    draft.tensors[f"{PREFIX}{Q0}.lora_magnitude_vector"] = torch.ones(256)


@bad_weights(Code.UNSUPPORTED_FEATURE, words=(f"{Q0}.bias", "'bias': 'none'"))
def biases_trained(draft: Draft) -> None:
    draft.config["bias"] = "all"
    draft.tensors[f"{PREFIX}{Q0}.bias"] = torch.zeros(256)


@bad_weights(Code.UNKNOWN_TENSOR, words=(f"{Q0}.bias", "a bias of the base model"))
def a_bias_that_the_configuration_denies(draft: Draft) -> None:
    draft.tensors[f"{PREFIX}{Q0}.bias"] = torch.zeros(256)


@bad_weights(Code.UNKNOWN_TENSOR, words=("norm.weight", "a full weight"))
def a_full_weight(draft: Draft) -> None:
    draft.tensors[f"{PREFIX}model.norm.weight"] = torch.ones(96)


@bad_weights(Code.UNKNOWN_TENSOR, words=("_proj.weight", "a full weight", "20 more like this"))
def the_base_model_instead(draft: Draft) -> None:
    draft.tensors = {
        name.replace(".lora_A", ""): torch.zeros(8, 8)
        for name in draft.tensors
        if ".lora_A" in name
    }


@bad_weights(Code.UNKNOWN_TENSOR, words=("lora_a", "as MLX-LM names it", "41 more like this"))
def tensors_named_by_mlx(draft: Draft) -> None:
    draft.tensors = {
        name.removeprefix(PREFIX).removesuffix(".weight").lower(): tensor.T.contiguous()
        for name, tensor in draft.tensors.items()
    }


@bad_weights(Code.UNKNOWN_TENSOR, words=("lora_te_model", "kohya's scripts and ComfyUI", "62 more"))
def tensors_named_by_kohya(draft: Draft) -> None:
    tensors = {}
    for name, tensor in draft.tensors.items():
        module, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        flat = f"lora_te_{module.replace('.', '_')}"
        tensors[f"{flat}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(16.0)
    draft.tensors = tensors


@bad_weights(Code.UNKNOWN_TENSOR, words=("linear_in", "as NeMo and Megatron Bridge name it"))
def tensors_named_by_nemo(draft: Draft) -> None:
    draft.rename(
        lambda name: name.replace(".lora_A.", ".adapter.linear_in.").replace(
            ".lora_B.", ".adapter.linear_out."
        )
    )


@bad_weights(Code.DUPLICATE_TENSOR, words=(Q0, "one lora_A"))
def a_tensor_twice(draft: Draft) -> None:
    draft.tensors[f"{PREFIX}{Q0}.lora_A.default.weight"] = draft.tensors[A].clone()


@bad_weights(Code.UNKNOWN_TENSOR, words=("lora_embedding_A", "is no embedding"))
def a_linear_module_as_embedding(draft: Draft) -> None:
    draft.tensors[f"{PREFIX}{Q0}.lora_embedding_A"] = draft.tensors.pop(A)
    draft.tensors[f"{PREFIX}{Q0}.lora_embedding_B"] = draft.tensors.pop(B)


@bad_weights(Code.UNKNOWN_TENSOR, words=("lora_embedding_A", "is no embedding"))
def a_head_as_embedding(draft: Draft) -> None:
    add_head(draft)
    for part in "AB":
        values = draft.tensors.pop(name_of("lm_head", part))
        draft.tensors[f"{PREFIX}lm_head.lora_embedding_{part}"] = values


@bad_weights(Code.WRONG_VOCABULARY, words=("lora_embedding_A", "[8, 320]", "a vocabulary of 300"))
def embedding_of_a_larger_vocabulary(draft: Draft) -> None:
    add_embedding(draft)
    draft.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = torch.zeros(8, 320)


@bad_weights(Code.WRONG_SHAPE, words=("lora_embedding_B", "[64, 8]", "[96, 8]"))
def embedding_of_another_width(draft: Draft) -> None:
    add_embedding(draft)
    draft.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = torch.zeros(64, 8)


@bad_weights(Code.WRONG_VOCABULARY, words=("lm_head.lora_B", "[299, 8]", "a vocabulary of 300"))
def head_of_a_smaller_vocabulary(draft: Draft) -> None:
    add_head(draft)
    draft.tensors[name_of("lm_head", "B")] = torch.zeros(VOCABULARY - 1, 8)


@bad_weights(Code.WRONG_SHAPE, words=("lm_head.lora_A", "[8, 128]", "[8, 96]"))
def head_of_another_width(draft: Draft) -> None:
    add_head(draft)
    draft.tensors[name_of("lm_head", "A")] = torch.zeros(8, 128)


@bad_weights(Code.NOT_FINITE, words=(A, "1 of 768 values", "the first at [2, 5]"))
def a_with_one_nan(draft: Draft) -> None:
    draft.tensors[A][2, 5] = float("nan")


@bad_weights(Code.NOT_FINITE, words=(name_of(DOWN2, "B"), "the first at [95, 7]"))
def the_last_value_infinite(draft: Draft) -> None:
    draft.tensors[name_of(DOWN2, "B")][-1, -1] = float("-inf")


@bad_weights(Code.NOT_FINITE, words=("NaN or infinite", "41 more like this"))
def all_values_nan(draft: Draft) -> None:
    draft.tensors = {n: torch.full_like(t, float("nan")) for n, t in draft.tensors.items()}


@bad_weights(Code.NOT_FINITE, words=(A, "values NaN or infinite"))
def a_nan_in_bfloat16(draft: Draft) -> None:
    draft.tensors = {n: t.to(torch.bfloat16) for n, t in draft.tensors.items()}
    draft.tensors[A][0, 0] = float("nan")


@bad_weights(Code.NOT_FINITE, words=(A, "values NaN or infinite"))
def an_infinity_in_float16(draft: Draft) -> None:
    draft.tensors = {n: t.to(torch.float16) for n, t in draft.tensors.items()}
    draft.tensors[A][0, 0] = float("inf")


@bad_weights(Code.OVERFLOW, words=(B, "times the scaling 1e+10", "float32"))
def values_that_overflow_once_scaled(draft: Draft) -> Draft:
    changed = good([Q0], lora_alpha=8e10)
    changed.tensors[B][0, 0] = 1e30
    return changed


@bad(
    CONFIG,
    Code.UNSUPPORTED_FEATURE,
    Code.HALF_MISSING,
    Code.WRONG_SHAPE,
    Code.NOT_FINITE,
    words=("use_dora",),
)
def wrong_in_four_ways(draft: Draft) -> None:
    draft.config["use_dora"] = True
    del draft.tensors[B]
    draft.tensors[name_of(V1, "A")] = torch.zeros(8, 95)
    draft.tensors[name_of(DOWN2, "A")][0, 0] = float("nan")
