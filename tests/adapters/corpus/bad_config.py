"""Adapters whose `adapter_config.json` is wrong, or asks for what is not served."""

import json
from pathlib import Path

import torch

from vllm_multilora.adapters.problems import Code

from .cases import bad_config
from .draft import CONFIG, PREFIX, Q0, Draft, good, set_rank
from .llama_layout import HIDDEN


def _replace(draft: Draft, content: bytes) -> None:
    draft.afterwards.append(lambda folder: (folder / CONFIG).write_bytes(content))


@bad_config(Code.CONFIG_NOT_JSON, words=("not valid JSON", "save_pretrained"))
def config_empty(draft: Draft) -> None:
    _replace(draft, b"")


@bad_config(Code.CONFIG_NOT_JSON, words=("not valid JSON",))
def config_cut_short(draft: Draft) -> None:
    def cut(folder: Path) -> None:
        content = (folder / CONFIG).read_bytes()
        (folder / CONFIG).write_bytes(content[: len(content) // 2])

    draft.afterwards.append(cut)


@bad_config(Code.CONFIG_NOT_JSON, words=("not valid JSON", "utf-8"))
def config_not_text(draft: Draft) -> None:
    _replace(draft, b"\x80\x04\x95\xff\xfe\xfa")


@bad_config(Code.CONFIG_NOT_JSON, words=("not valid JSON", "utf-8"))
def config_in_utf_16(draft: Draft) -> None:
    def encode(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(draft.config), encoding="utf-16")

    draft.afterwards.append(encode)


@bad_config(Code.CONFIG_NOT_JSON, words=("not valid JSON",))
def config_nested_without_end(draft: Draft) -> None:
    _replace(draft, b"[" * 200_000)


@bad_config(Code.CONFIG_NOT_JSON, words=("a JSON list", "an object"))
def config_a_list(draft: Draft) -> None:
    _replace(draft, b"[]")


@bad_config(Code.FILE_TOO_LARGE, words=("longer than",))
def config_huge(draft: Draft) -> None:
    draft.config["comment"] = " " * (5 << 20)


@bad_config(Code.CONFIG_KEY_MISSING, words=("'r' is missing", "a positive whole number"))
def rank_missing(draft: Draft) -> None:
    del draft.config["r"]


@bad_config(Code.CONFIG_KEY_MISSING, words=("'lora_alpha' is missing", "a number"))
def alpha_missing(draft: Draft) -> None:
    del draft.config["lora_alpha"]


@bad_config(Code.CONFIG_KEY_MISSING, words=("'target_modules' is missing",))
def target_modules_missing(draft: Draft) -> None:
    del draft.config["target_modules"]


@bad_config(
    Code.CONFIG_KEY_MISSING,
    Code.CONFIG_VALUE,
    Code.CONFIG_VALUE,
    words=("'r' is missing",),
)
def config_wrong_in_three_ways(draft: Draft) -> None:
    del draft.config["r"]
    draft.config |= {"lora_alpha": "16", "bias": 3}


@bad_config(Code.CONFIG_VALUE, words=("'r' is '8'", "a positive whole number"))
def rank_a_text(draft: Draft) -> None:
    draft.config["r"] = "8"


@bad_config(Code.CONFIG_VALUE, words=("'r' is 0", "a positive whole number"))
def rank_zero(draft: Draft) -> None:
    draft.config["r"] = 0


@bad_config(Code.CONFIG_VALUE, words=("'r' is -8",))
def rank_negative(draft: Draft) -> None:
    draft.config["r"] = -8


@bad_config(Code.CONFIG_VALUE, words=("'r' is 1000", "at most"))
def rank_beyond_floats(draft: Draft) -> None:
    draft.config["r"] = 10**400


@bad_config(Code.CONFIG_VALUE, words=("'r' is 8.5",))
def rank_a_fraction(draft: Draft) -> None:
    draft.config["r"] = 8.5


@bad_config(Code.CONFIG_VALUE, words=("'r' is True",))
def rank_a_boolean(draft: Draft) -> None:
    draft.config["r"] = True


@bad_config(Code.CONFIG_VALUE, words=("'lora_alpha' is None", "a number"))
def alpha_null(draft: Draft) -> None:
    draft.config["lora_alpha"] = None


@bad_config(Code.CONFIG_VALUE, words=("'lora_alpha' is nan", "a finite number"))
def alpha_not_a_number(draft: Draft) -> None:
    draft.config["lora_alpha"] = float("nan")


@bad_config(Code.CONFIG_VALUE, words=("'lora_alpha' is 1", "a finite number"))
def alpha_beyond_floats(draft: Draft) -> None:
    draft.config["lora_alpha"] = 10**400


@bad_config(Code.CONFIG_VALUE, words=("'target_modules' is 7", "a list of module names"))
def target_modules_a_number(draft: Draft) -> None:
    draft.config["target_modules"] = 7


@bad_config(Code.CONFIG_VALUE, words=("'target_modules' is ['q_proj', 3]",))
def target_modules_with_a_number(draft: Draft) -> None:
    draft.config["target_modules"] = ["q_proj", 3]


@bad_config(Code.CONFIG_PATTERN, words=("'*_proj'", "not a regular expression"))
def target_modules_a_broken_expression(draft: Draft) -> None:
    draft.config["target_modules"] = "*_proj"


@bad_config(Code.CONFIG_VALUE, words=("'use_rslora' is 'yes'", "true or false"))
def rslora_a_text(draft: Draft) -> None:
    draft.config["use_rslora"] = "yes"


@bad_config(Code.CONFIG_VALUE, words=("'fan_in_fan_out' is 'no'", "true or false"))
def fan_in_fan_out_a_text(draft: Draft) -> None:
    draft.config["fan_in_fan_out"] = "no"


@bad_config(Code.CONFIG_VALUE, words=("'layers_to_transform' is ['first']", "number"))
def layers_to_transform_by_name(draft: Draft) -> None:
    draft.config["layers_to_transform"] = ["first"]


@bad_config(Code.CONFIG_VALUE, words=("'base_model_name_or_path' is 3",))
def base_model_a_number(draft: Draft) -> None:
    draft.config["base_model_name_or_path"] = 3


@bad_config(Code.CONFIG_VALUE, words=("'rank_pattern' is [8]", "an object"))
def rank_pattern_a_list(draft: Draft) -> None:
    draft.config["rank_pattern"] = [8]


@bad_config(Code.CONFIG_VALUE, words=("rank_pattern['q_proj'] is 0", "a positive whole number"))
def rank_pattern_with_rank_zero(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"q_proj": 0}


@bad_config(Code.CONFIG_VALUE, words=("alpha_pattern['q_proj'] is '4'", "a number"))
def alpha_pattern_with_a_text(draft: Draft) -> None:
    draft.config["alpha_pattern"] = {"q_proj": "4"}


@bad_config(Code.CONFIG_PATTERN, words=("'rank_pattern'", "'(q_proj'", "not a regular expression"))
def rank_pattern_with_a_broken_expression(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"(q_proj": 8}


@bad_config(Code.CONFIG_PATTERN, words=("'rank_pattern'", "(.*)*x", "repeats a group"))
def rank_pattern_that_never_ends(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"(.*)*x": 8}


@bad_config(Code.CONFIG_PATTERN, words=("'alpha_pattern'", "repeats a group"))
def alpha_pattern_that_fills_memory(draft: Draft) -> None:
    draft.config["alpha_pattern"] = {"(((a{1000}){1000}){1000}){1000}": 8}


@bad_config(Code.RANK_TOO_LARGE, words=("r is 65", "at most 64", "--max-lora-rank 128 or more"))
def rank_over_the_limit(draft: Draft) -> Draft:
    return good(rank=65)


@bad_config(Code.RANK_TOO_LARGE, words=("rank_pattern['q_proj'] is 128", "at most 64"))
def pattern_rank_over_the_limit(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"q_proj": 128}
    for layer in range(3):
        set_rank(draft, f"model.layers.{layer}.self_attn.q_proj", 128)


@bad_config(Code.UNSUPPORTED_PEFT_TYPE, words=("'peft_type' is 'ADALORA'", "'LORA'"))
def another_peft_method(draft: Draft) -> None:
    draft.config["peft_type"] = "ADALORA"


@bad_config(Code.UNSUPPORTED_PEFT_TYPE, Code.UNKNOWN_TENSOR, words=("'peft_type' is 'IA3'",))
def another_peft_method_with_keys_of_its_own(draft: Draft) -> None:
    draft.config = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    draft.tensors = {f"{PREFIX}{Q0}.ia3_l": torch.ones(256, 1)}


@bad_config(Code.CONFIG_VALUE, words=("'bias' is 'some'", "'none', 'all' or 'lora_only'"))
def bias_of_no_kind(draft: Draft) -> None:
    draft.config["bias"] = "some"


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'use_dora' is True", "DoRA"))
def dora(draft: Draft) -> None:
    draft.config["use_dora"] = True
    draft.tensors[f"{PREFIX}{Q0}.lora_magnitude_vector"] = torch.ones(256)


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'lora_bias' is True",))
def bias_of_b(draft: Draft) -> None:
    draft.config["lora_bias"] = True
    draft.tensors[f"{PREFIX}{Q0}.lora_B.bias"] = torch.ones(256)


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'init_lora_weights' is 'pissa'", "conversion"))
def pissa(draft: Draft) -> None:
    draft.config["init_lora_weights"] = "pissa"


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'layer_replication' is [[0, 2], [1, 3]]",))
def replicated_layers(draft: Draft) -> None:
    draft.config["layer_replication"] = [[0, 2], [1, 3]]


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'use_qalora' is True",))
def qalora(draft: Draft) -> None:
    draft.config["use_qalora"] = True


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'use_bdlora'", "block-diagonal"))
def block_diagonal_lora(draft: Draft) -> None:
    draft.config["use_bdlora"] = {"nblocks": 2}


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'kasa_config'", "singular values"))
def kasa(draft: Draft) -> None:
    draft.config["kasa_config"] = {"beta": 0.1}


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'kasa_config' is {}", "singular values"))
def kasa_with_default_values(draft: Draft) -> None:
    draft.config["kasa_config"] = {}


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'trainable_token_indices' is [1, 2]",))
def single_tokens_trained(draft: Draft) -> None:
    draft.config["trainable_token_indices"] = [1, 2]


@bad_config(Code.UNSUPPORTED_MODULES_TO_SAVE, words=("modules_to_save is ['lm_head']",))
def head_saved_whole(draft: Draft) -> None:
    draft.config["modules_to_save"] = ["lm_head"]
    draft.tensors[f"{PREFIX}lm_head.weight"] = torch.zeros(300, HIDDEN)
