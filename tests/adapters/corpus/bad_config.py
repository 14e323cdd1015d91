"""Adapters whose `adapter_config.json` is wrong, or asks for what is not served."""

import json
import os

import torch

from vllm_multilora.adapters.problems import Code

from .cases import Change, add_bad
from .draft import CONFIG, PREFIX, Q0, Draft, content, edited, files, good, set_rank
from .llama_layout import HIDDEN

NOT_JSON = Code.CONFIG_NOT_JSON
VALUE, PATTERN, UNSUPPORTED = Code.CONFIG_VALUE, Code.CONFIG_PATTERN, Code.UNSUPPORTED_FEATURE
WHOLE = "a positive whole number"
NEVER_ENDS = "(((a{1000}){1000}){1000}){1000}"


def without(key: str, **others: object) -> Change:
    def change(draft: Draft) -> None:
        del draft.config[key]
        draft.config |= others

    return change


def in_utf_16(draft: Draft) -> None:
    draft.afterwards.append(
        lambda folder: (folder / CONFIG).write_text(json.dumps(draft.config), encoding="utf-16")
    )


def pattern_rank_over_the_limit(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"q_proj": 128}
    for layer in range(3):
        set_rank(draft, f"model.layers.{layer}.self_attn.q_proj", 128)


def of_another_method(draft: Draft) -> None:
    draft.config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    draft.tensors = {f"{PREFIX}{Q0}.ia3_l": torch.ones(256, 1)}


add_bad(
    CONFIG,
    {
        "config-empty": (content(CONFIG, b""), NOT_JSON, "not valid JSON", "save_pretrained"),
        "config-cut-short": (
            files(lambda folder: os.truncate(folder / CONFIG, 50)),
            *(NOT_JSON, "not valid JSON"),
        ),
        "config-not-text": (content(CONFIG, b"\x80\x04\xff"), NOT_JSON, "valid JSON", "utf-8"),
        "config-in-utf-16": (in_utf_16, NOT_JSON, "not valid JSON", "utf-8"),
        "config-nested-without-end": (content(CONFIG, b"[" * 200_000), NOT_JSON, "not valid"),
        "config-a-giant-number": (content(CONFIG, b"1" * 5_000), NOT_JSON, "not valid JSON"),
        "config-a-list": (content(CONFIG, b"[]"), NOT_JSON, "a JSON list", "an object"),
        "config-huge": (edited(comment=" " * (5 << 20)), Code.FILE_TOO_LARGE, "longer than"),
        "rank-missing": (without("r"), Code.CONFIG_KEY_MISSING, "'r' is missing", WHOLE),
        "alpha-missing": (
            without("lora_alpha"),
            *(Code.CONFIG_KEY_MISSING, "'lora_alpha' is missing", "a number"),
        ),
        "target-modules-missing": (
            without("target_modules"),
            *(Code.CONFIG_KEY_MISSING, "'target_modules' is missing"),
        ),
        "config-wrong-in-three-ways": (
            without("r", lora_alpha="16", bias=3),
            *((Code.CONFIG_KEY_MISSING, VALUE, VALUE), "'r' is missing"),
        ),
        "rank-a-text": (edited(r="8"), VALUE, "'r' is '8'", WHOLE),
        "rank-zero": (edited(r=0), VALUE, "'r' is 0", WHOLE),
        "rank-beyond-floats": (edited(r=10**400), VALUE, "'r' is 1000", "at most"),
        "rank-a-fraction": (edited(r=8.5), VALUE, "'r' is 8.5"),
        "rank-a-boolean": (edited(r=True), VALUE, "'r' is True"),
        "alpha-null": (edited(lora_alpha=None), VALUE, "'lora_alpha' is None", "a number"),
        "alpha-not-a-number": (edited(lora_alpha=float("nan")), VALUE, "is nan", "finite number"),
        "target-modules-a-number": (
            edited(target_modules=7),
            *(VALUE, "'target_modules' is 7", "a list of module names"),
        ),
        "target-modules-with-a-number": (
            edited(target_modules=["q_proj", 3]),
            *(VALUE, "'target_modules' is ['q_proj', 3]"),
        ),
        "target-modules-a-broken-expression": (
            edited(target_modules="*_proj"),
            *(PATTERN, "'*_proj'", "not a regular expression"),
        ),
        "rslora-a-text": (edited(use_rslora="yes"), VALUE, "is 'yes'", "true or false"),
        "layers-to-transform-by-name": (
            edited(layers_to_transform=["first"]),
            *(VALUE, "'layers_to_transform' is ['first']", "number"),
        ),
        "base-model-a-number": (edited(base_model_name_or_path=3), VALUE, "is 3"),
        "modules-to-save-a-text": (edited(modules_to_save="score"), VALUE, "is 'score'", "a list"),
        "rank-pattern-a-list": (edited(rank_pattern=[8]), VALUE, "is [8]", "an object"),
        "rank-pattern-with-rank-zero": (
            edited(rank_pattern={"q_proj": 0}),
            *(VALUE, "rank_pattern['q_proj'] is 0", WHOLE),
        ),
        "alpha-pattern-with-a-text": (
            edited(alpha_pattern={"q_proj": "4"}),
            *(VALUE, "alpha_pattern['q_proj'] is '4'", "a number"),
        ),
        "rank-pattern-with-a-broken-expression": (
            edited(rank_pattern={"(q_proj": 8}),
            *(PATTERN, "'rank_pattern'", "'(q_proj'", "not a regular expression"),
        ),
        "rank-pattern-that-never-ends": (
            edited(rank_pattern={"(.*)*x": 8}),
            *(PATTERN, "'rank_pattern'", "(.*)*x", "repeats a group"),
        ),
        "alpha-pattern-that-fills-memory": (
            edited(alpha_pattern={NEVER_ENDS: 8}),
            *(PATTERN, "'alpha_pattern'", "repeats a group"),
        ),
        "rank-over-the-limit": (
            lambda _: good(rank=65),
            *(Code.RANK_TOO_LARGE, "r is 65", "at most 64", "--max-lora-rank 128 or more"),
        ),
        "pattern-rank-over-the-limit": (
            pattern_rank_over_the_limit,
            *(Code.RANK_TOO_LARGE, "rank_pattern['q_proj'] is 128", "at most 64"),
        ),
        "another-peft-method": (
            edited(peft_type="ADALORA"),
            *(Code.UNSUPPORTED_PEFT_TYPE, "'peft_type' is 'ADALORA'", "'LORA'"),
        ),
        "another-peft-method-with-keys-of-its-own": (
            of_another_method,
            *((Code.UNSUPPORTED_PEFT_TYPE, Code.UNKNOWN_TENSOR), "'peft_type' is 'IA3'"),
        ),
        "bias-of-no-kind": (
            edited(bias="some"),
            *(VALUE, "'bias' is 'some'", "'none', 'all' or 'lora_only'"),
        ),
        "dora": (
            edited({f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(256)}, use_dora=True),
            *(UNSUPPORTED, "'use_dora' is True", "DoRA"),
        ),
        "bias-of-b": (
            edited({f"{PREFIX}{Q0}.lora_B.bias": torch.ones(256)}, lora_bias=True),
            *(UNSUPPORTED, "'lora_bias' is True"),
        ),
        "pissa": (
            edited(init_lora_weights="pissa_niter_4"),
            *(UNSUPPORTED, "'init_lora_weights' is 'pissa_niter_4'", "conversion"),
        ),
        "replicated-layers": (
            edited(layer_replication=[[0, 2], [1, 3]]),
            *(UNSUPPORTED, "'layer_replication' is [[0, 2], [1, 3]]"),
        ),
        "qalora": (edited(use_qalora=True), UNSUPPORTED, "'use_qalora' is True"),
        "block-diagonal-lora": (
            edited(use_bdlora={"nblocks": 2}),
            *(UNSUPPORTED, "'use_bdlora'", "block-diagonal"),
        ),
        "kasa-with-default-values": (
            edited(kasa_config={}),
            *(UNSUPPORTED, "'kasa_config' is {}", "singular values"),
        ),
        "single-tokens-trained": (
            edited(trainable_token_indices=[1, 2]),
            *(UNSUPPORTED, "'trainable_token_indices' is [1, 2]"),
        ),
        "head-saved-whole": (
            edited(
                {f"{PREFIX}lm_head.weight": torch.zeros(300, HIDDEN)}, modules_to_save=["lm_head"]
            ),
            *(Code.UNSUPPORTED_MODULES_TO_SAVE, "modules_to_save is ['lm_head']"),
        ),
    },
)
