"""Adapters that are unusual in one way, and right."""

import json
from pathlib import Path

import torch

from .cases import valid
from .draft import (
    CONFIG,
    PREFIX,
    Q0,
    RANK,
    Draft,
    add_embedding,
    add_head,
    good,
    name_of,
    set_rank,
)
from .headers import rewrite
from .llama_layout import HIDDEN, LAYERS, MAX_RANK, MODULES, VOCABULARY


@valid()
def plain(draft: Draft) -> None:
    """Nothing unusual."""


@valid()
def one_module(draft: Draft) -> Draft:
    return good([Q0], target_modules=[Q0])


@valid()
def gate_only(draft: Draft) -> Draft:
    return good([m for m in MODULES if m.endswith("gate_proj")])


@valid()
def rank_one(draft: Draft) -> Draft:
    return good(rank=1)


@valid()
def rank_odd(draft: Draft) -> Draft:
    return good(rank=13)


@valid()
def rank_at_the_limit(draft: Draft) -> Draft:
    return good(rank=MAX_RANK)


@valid()
def rslora(draft: Draft) -> Draft:
    return good(rank=16, use_rslora=True)


@valid()
def rank_pattern_by_suffix(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"q_proj": 4, "layers.1.mlp.down_proj": 24}
    for layer in range(LAYERS):
        set_rank(draft, f"model.layers.{layer}.self_attn.q_proj", 4)
    set_rank(draft, "model.layers.1.mlp.down_proj", 24)


@valid()
def rank_pattern_by_expression(draft: Draft) -> None:
    draft.config["rank_pattern"] = {r"model\.layers\.[01]\.self_attn\.v_proj": 5}
    for layer in (0, 1):
        set_rank(draft, f"model.layers.{layer}.self_attn.v_proj", 5)


@valid()
def alpha_pattern(draft: Draft) -> None:
    draft.config["alpha_pattern"] = {"k_proj": 40, "layers.0.mlp.up_proj": 4.5}


@valid()
def alpha_a_fraction(draft: Draft) -> None:
    draft.config["lora_alpha"] = 12.5


@valid()
def alpha_negative(draft: Draft) -> None:
    draft.config["lora_alpha"] = -16


@valid()
def targets_an_expression(draft: Draft) -> None:
    draft.config["target_modules"] = r".*\.(self_attn|mlp)\.[a-z]+_proj"


@valid()
def targets_all_linear(draft: Draft) -> None:
    draft.config["target_modules"] = "all-linear"


@valid()
def targets_beyond_the_tensors(draft: Draft) -> Draft:
    targets = ["q_proj", "out_proj"]  # the base has no out_proj, and PEFT did not mind
    return good([m for m in MODULES if m.endswith("q_proj")], target_modules=targets)


@valid()
def targets_with_whole_names(draft: Draft) -> Draft:
    """Which layers are to be transformed does not matter for these."""
    names = [Q0, "model.layers.1.mlp.up_proj"]
    return good(names, target_modules=names, layers_to_transform=[2], exclude_modules=["k_proj"])


@valid()
def one_layer(draft: Draft) -> Draft:
    modules = [m for m in MODULES if ".layers.1." in m]
    return good(modules, layers_to_transform=1, layers_pattern="layers")


@valid()
def some_layers(draft: Draft) -> Draft:
    return good([m for m in MODULES if ".layers.1." not in m], layers_to_transform=[0, 2])


@valid()
def bfloat16(draft: Draft) -> None:
    draft.tensors = {n: t.to(torch.bfloat16) for n, t in draft.tensors.items()}


@valid()
def float16(draft: Draft) -> None:
    draft.tensors = {n: t.to(torch.float16) for n, t in draft.tensors.items()}


@valid()
def dtypes_mixed(draft: Draft) -> None:
    for name in draft.tensors:
        if ".lora_B." in name:
            draft.tensors[name] = draft.tensors[name].to(torch.bfloat16)


@valid()
def embedding(draft: Draft) -> None:
    add_embedding(draft)


@valid()
def head(draft: Draft) -> None:
    add_head(draft)


@valid(read_by_peft=False)
def head_of_tied_weights(draft: Draft) -> None:
    """PEFT names the embedding alone among the targets, and saves the head's copies, too."""
    add_embedding(draft)
    add_head(draft)
    draft.config["target_modules"].remove("lm_head")
    draft.config["ensure_weight_tying"] = True


@valid(read_by_peft=False)
def embedding_with_a_copy_of_the_base(draft: Draft) -> None:
    """As PEFT writes beside an adapted embedding; PEFT would put this one into its base."""
    add_embedding(draft)
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    generator = torch.Generator().manual_seed(0)
    draft.tensors[name] = torch.randn(VOCABULARY, HIDDEN, generator=generator)


@valid()
def trained_with_velora(draft: Draft) -> None:
    draft.config["velora_config"] = {"num_groups": 2}
    for module, (inputs, _) in MODULES.items():
        draft.tensors[f"{PREFIX}{module}.lora_velora_embed"] = torch.ones(inputs // 2)


@valid()
def trained_with_monteclora(draft: Draft) -> None:
    draft.config["monteclora_config"] = {"num_samples": 8}
    shapes = {"expert_weights": (8,), "expert_weights_prior": (8,), "std_prior": (RANK,)}
    for module in MODULES:
        prefix = f"{PREFIX}{module}.lora_monteclora_sampler."
        for name, shape in (shapes | {"gaussian_var_prior": (RANK, RANK)}).items():
            draft.tensors[prefix + name] = torch.ones(shape)


@valid()
def initialised_orthogonally(draft: Draft) -> None:
    draft.config["init_lora_weights"] = "orthogonal"


@valid()
def fan_in_fan_out(draft: Draft) -> None:
    draft.config["fan_in_fan_out"] = True


@valid(read_by_peft=False)
def optional_keys_null(draft: Draft) -> None:
    draft.config |= dict.fromkeys(
        ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules", "use_dora")
    )


@valid()
def few_keys(draft: Draft) -> None:
    keys = ("peft_type", "r", "lora_alpha", "target_modules")
    draft.config = {key: draft.config[key] for key in keys}


@valid()
def keys_of_the_future(draft: Draft) -> None:
    draft.config |= {"some_new_option": None, "auto_mapping": None, "inference_mode": True}


@valid()
def unset_features(draft: Draft) -> None:
    draft.config |= {
        "use_dora": False,
        "lora_bias": False,
        "layer_replication": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "use_bdlora": None,
        "trainable_token_indices": None,
    }


@valid()
def biases_asked_for_where_the_base_has_none(draft: Draft) -> None:
    draft.config["bias"] = "all"


@valid()
def some_values_zero(draft: Draft) -> None:
    """As B is before training: the module changes nothing."""
    draft.tensors[name_of(Q0, "B")].zero_()


@valid()
def metadata_absent(draft: Draft) -> None:
    draft.metadata = None


@valid()
def metadata_null(draft: Draft) -> None:
    rewrite(draft, lambda header: header | {"__metadata__": None})


@valid()
def tensors_in_another_order(draft: Draft) -> None:
    rewrite(draft, lambda header: dict(reversed(header.items())))


@valid()
def config_beyond_ascii(draft: Draft) -> None:
    """Letters beyond ASCII, unescaped."""
    draft.config["base_model_name_or_path"] = "modèle/日本語"

    def unescape(folder: Path) -> None:
        text = json.dumps(draft.config, ensure_ascii=False)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    draft.afterwards.append(unescape)


@valid(read_by_peft=False)
def names_without_prefix(draft: Draft) -> None:
    draft.rename(lambda name: name.removeprefix(PREFIX))


@valid(read_by_peft=False)
def names_in_a_compiled_model(draft: Draft) -> None:
    draft.rename(lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."))


@valid(read_by_peft=False)
def names_with_the_prefix_twice(draft: Draft) -> None:
    draft.rename(lambda name: PREFIX + name)


@valid()
def targets_an_expression_of_all_names(draft: Draft) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(200)]
    draft.config["target_modules"] = f"({'|'.join([*names, '.*_proj'])})"


@valid(read_by_peft=False)
def peft_type_absent(draft: Draft) -> None:
    del draft.config["peft_type"]


@valid()
def no_tokens_among_those_that_are_trained_alone(draft: Draft) -> None:
    draft.config["trainable_token_indices"] = {}
