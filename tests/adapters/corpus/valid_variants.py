"""Adapters that are unusual in one way, and right."""

import json
from pathlib import Path

import torch

from .cases import Change, add_valid
from .draft import (
    CONFIG,
    PREFIX,
    Q0,
    RANK,
    Draft,
    add_embedding,
    add_head,
    all_tensors,
    edited,
    good,
    name_of,
    set_rank,
)
from .headers import rewrite
from .llama_layout import HIDDEN, LAYERS, MAX_RANK, MODULES, VOCABULARY

WHOLE_NAMES = [Q0, "model.layers.1.mlp.up_proj"]
ALL_NAMES = [*(f"model.layers.{i}.self_attn.q_proj" for i in range(200)), ".*_proj"]


def of_modules(part: str, **config: object) -> Change:
    """An adapter of those modules alone that have a part in their names."""
    return lambda _: good([name for name in MODULES if part in name], **config)


def rank_pattern_by_suffix(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"q_proj": 4, "layers.1.mlp.down_proj": 24}
    for layer in range(LAYERS):
        set_rank(draft, f"model.layers.{layer}.self_attn.q_proj", 4)
    set_rank(draft, "model.layers.1.mlp.down_proj", 24)


def rank_pattern_by_expression(draft: Draft) -> None:
    draft.config["rank_pattern"] = {r"model\.layers\.[01]\.self_attn\.v_proj": 5}
    for layer in (0, 1):
        set_rank(draft, f"model.layers.{layer}.self_attn.v_proj", 5)


def of_dtype(dtype: torch.dtype, part: str = "lora_") -> Change:
    return all_tensors(lambda found: {n: t.to(dtype) if part in n else t for n, t in found.items()})


def head_of_tied_weights(draft: Draft) -> None:
    """PEFT names the embedding alone among the targets, and saves the head's copies, too."""
    add_embedding(draft)
    add_head(draft)
    draft.config["target_modules"].remove("lm_head")
    draft.config["ensure_weight_tying"] = True


def embedding_with_a_copy_of_the_base(draft: Draft) -> None:
    """As PEFT writes beside an adapted embedding; PEFT would put this one into its base."""
    add_embedding(draft)
    name = f"{PREFIX}model.embed_tokens.base_layer.weight"
    draft.tensors[name] = torch.ones(VOCABULARY, HIDDEN)


def trained_with_velora(draft: Draft) -> None:
    draft.config["velora_config"] = {"num_groups": 2}
    for module, (inputs, _) in MODULES.items():
        draft.tensors[f"{PREFIX}{module}.lora_velora_embed"] = torch.ones(inputs // 2)


def trained_with_monteclora(draft: Draft) -> None:
    draft.config["monteclora_config"] = {"num_samples": 8}
    shapes = {"expert_weights": (8,), "expert_weights_prior": (8,), "std_prior": (RANK,)}
    for module in MODULES:
        prefix = f"{PREFIX}{module}.lora_monteclora_sampler."
        for name, shape in (shapes | {"gaussian_var_prior": (RANK, RANK)}).items():
            draft.tensors[prefix + name] = torch.ones(shape)


def few_keys(draft: Draft) -> None:
    keys = ("peft_type", "r", "lora_alpha", "target_modules")
    draft.config = {key: draft.config[key] for key in keys}


def some_values_zero(draft: Draft) -> None:
    """As B is before training: the module changes nothing."""
    draft.tensors[name_of(Q0, "B")].zero_()


def metadata_absent(draft: Draft) -> None:
    draft.metadata = None


def config_beyond_ascii(draft: Draft) -> None:
    draft.config["base_model_name_or_path"] = "modèle/日本語"

    def unescape(folder: Path) -> None:
        text = json.dumps(draft.config, ensure_ascii=False)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    draft.afterwards.append(unescape)


add_valid(
    {
        "plain": edited(),
        "one-module": lambda _: good([Q0], target_modules=[Q0]),
        "gate-only": of_modules("gate_proj"),
        "rank-one": lambda _: good(rank=1),
        "rank-odd": lambda _: good(rank=13),
        "rank-at-the-limit": lambda _: good(rank=MAX_RANK),
        "rslora": lambda _: good(rank=16, use_rslora=True),
        "rank-pattern-by-suffix": rank_pattern_by_suffix,
        "rank-pattern-by-expression": rank_pattern_by_expression,
        "alpha-pattern": edited(alpha_pattern={"k_proj": 40, "layers.0.mlp.up_proj": 4.5}),
        "alpha-a-fraction": edited(lora_alpha=12.5),
        "alpha-negative": edited(lora_alpha=-16),
        "targets-an-expression": edited(target_modules=r".*\.(self_attn|mlp)\.[a-z]+_proj"),
        "targets-an-expression-of-all-names": edited(target_modules=f"({'|'.join(ALL_NAMES)})"),
        "targets-all-linear": edited(target_modules="all-linear"),
        # The base has no out_proj, and PEFT did not mind.
        "targets-beyond-the-tensors": of_modules("q_proj", target_modules=["q_proj", "out_proj"]),
        # Which layers are to be transformed does not matter for these.
        "targets-with-whole-names": lambda _: good(
            WHOLE_NAMES,
            target_modules=WHOLE_NAMES,
            layers_to_transform=[2],
            exclude_modules=["k_proj"],
        ),
        "one-layer": of_modules(".layers.1.", layers_to_transform=1, layers_pattern="layers"),
        "some-layers": lambda _: good(
            [name for name in MODULES if ".layers.1." not in name], layers_to_transform=[0, 2]
        ),
        "bfloat16": of_dtype(torch.bfloat16),
        "float16": of_dtype(torch.float16),
        "dtypes-mixed": of_dtype(torch.bfloat16, ".lora_B."),
        "embedding": add_embedding,
        "head": add_head,
        "trained-with-velora": trained_with_velora,
        "trained-with-monteclora": trained_with_monteclora,
        "initialised-orthogonally": edited(init_lora_weights="orthogonal"),
        "fan-in-fan-out": edited(fan_in_fan_out=True),
        "few-keys": few_keys,
        "keys-of-the-future": edited(some_new_option=None, auto_mapping=None, inference_mode=True),
        "unset-features": edited(
            use_dora=False,
            lora_bias=False,
            layer_replication=None,
            alora_invocation_tokens=None,
            use_qalora=False,
            use_bdlora=None,
            trainable_token_indices=None,
        ),
        "biases-asked-for-where-the-base-has-none": edited(bias="all"),
        "no-tokens-among-those-that-are-trained-alone": edited(trainable_token_indices={}),
        "some-values-zero": some_values_zero,
        "metadata-absent": metadata_absent,
        "metadata-null": lambda draft: rewrite(draft, lambda found: found | {"__metadata__": None}),
        "tensors-in-another-order": lambda draft: rewrite(
            draft, lambda found: dict(reversed(found.items()))
        ),
        "config-beyond-ascii": config_beyond_ascii,
    }
)
add_valid(
    {
        "head-of-tied-weights": head_of_tied_weights,
        "embedding-with-a-copy-of-the-base": embedding_with_a_copy_of_the_base,
        "optional-keys-null": lambda draft: draft.config.update(
            rank_pattern=None,
            alpha_pattern=None,
            layers_to_transform=None,
            exclude_modules=None,
            use_dora=None,
        ),
        "names-without-prefix": lambda draft: draft.rename(lambda n: n.removeprefix(PREFIX)),
        "names-in-a-compiled-model": lambda draft: draft.rename(
            lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod.")
        ),
        "names-with-the-prefix-twice": lambda draft: draft.rename(lambda name: PREFIX + name),
        "peft-type-absent": lambda draft: draft.config.pop("peft_type"),
    },
    read_by_peft=False,
)
