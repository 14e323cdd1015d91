"""Activated adapters whose invocation is wrong, or that PEFT would not activate."""

from typing import Any

import torch

from vllm_multilora.adapters.problems import Code

from .cases import bad_config, bad_weights
from .draft import PREFIX, Q0, Draft, add_embedding
from .llama_layout import VOCABULARY

KEY = "alora_invocation_tokens"
MANY = "1 to 64 token ids"
WITH = "with 'alora_invocation_tokens'"


def _invoked(draft: Draft, tokens: Any = (5, 6), **config: Any) -> None:
    draft.config |= {KEY: list(tokens) if isinstance(tokens, tuple) else tokens, **config}


@bad_config(Code.CONFIG_VALUE, words=(f"'{KEY}' is '<|check|>'", "a list of token ids"))
def invocation_a_text(draft: Draft) -> None:
    _invoked(draft, "<|check|>")


@bad_config(Code.CONFIG_VALUE, words=(f"'{KEY}' is 5", "a list of token ids"))
def invocation_a_number(draft: Draft) -> None:
    _invoked(draft, 5)


@bad_config(Code.CONFIG_VALUE, words=(f"'{KEY}' is True",))
def invocation_a_boolean(draft: Draft) -> None:
    _invoked(draft, True)


@bad_config(Code.CONFIG_VALUE, words=(f"'{KEY}' is {{'5': 6}}",))
def invocation_an_object(draft: Draft) -> None:
    _invoked(draft, {"5": 6})


@bad_config(Code.CONFIG_VALUE, words=(f"'{KEY}' is a list of 0", MANY))
def invocation_empty(draft: Draft) -> None:
    _invoked(draft, ())


@bad_config(Code.CONFIG_VALUE, words=(f"'{KEY}' is a list of 65", MANY))
def invocation_too_long(draft: Draft) -> None:
    _invoked(draft, tuple(range(65)))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['1'] is '6'", "a token id"))
def invocation_with_a_text(draft: Draft) -> None:
    _invoked(draft, (5, "6"))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['0'] is 5.0", "a token id"))
def invocation_with_a_fraction(draft: Draft) -> None:
    _invoked(draft, (5.0,))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['1'] is True",))
def invocation_with_a_boolean(draft: Draft) -> None:
    _invoked(draft, (5, True))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['2'] is None",))
def invocation_with_a_null(draft: Draft) -> None:
    _invoked(draft, (5, 6, None))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['0'] is [5, 6]",))
def invocation_in_a_batch(draft: Draft) -> None:
    _invoked(draft, ([5, 6],))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['1'] is -1",))
def invocation_negative(draft: Draft) -> None:
    _invoked(draft, (5, -1))


@bad_config(Code.CONFIG_VALUE, words=(f"{KEY}['0'] is 1000",))
def invocation_beyond_integers(draft: Draft) -> None:
    _invoked(draft, (10**30,))


@bad_config(Code.WRONG_VOCABULARY, words=(KEY, f"ids below {VOCABULARY}", "another tokenizer"))
def invocation_beyond_the_vocabulary(draft: Draft) -> None:
    _invoked(draft, (5, VOCABULARY))


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'task_type' is 'SEQ_CLS'", f"'CAUSAL_LM' {WITH}"))
def activated_classifier(draft: Draft) -> None:
    _invoked(draft, task_type="SEQ_CLS")


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'task_type' is None", f"'CAUSAL_LM' {WITH}"))
def activated_without_a_task(draft: Draft) -> None:
    _invoked(draft, task_type=None)


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'use_dora' is True",))
def activated_dora(draft: Draft) -> None:
    _invoked(draft, use_dora=True)


@bad_weights(Code.UNSUPPORTED_FEATURE, words=("'bias': 'none'",))
def activated_bias(draft: Draft) -> None:
    _invoked(draft, bias="lora_only")
    draft.tensors[f"{PREFIX}{Q0}.bias"] = torch.zeros(256)


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'lora_bias' is True",))
def activated_bias_of_b(draft: Draft) -> None:
    _invoked(draft, lora_bias=True)
    draft.tensors[f"{PREFIX}{Q0}.lora_B.bias"] = torch.ones(256)


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'modules_to_save' is ['score']", "head"))
def activated_head(draft: Draft) -> None:
    _invoked(draft, modules_to_save=["score"])


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'target_parameters'", "linear layers only"))
def activated_parameters(draft: Draft) -> None:
    _invoked(draft, target_parameters=["mlp.experts.gate_up_proj"])


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'init_lora_weights' is 'mica'", "MiCA"))
def activated_mica(draft: Draft) -> None:
    _invoked(draft, init_lora_weights="mica")


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'velora_config'", "VeLoRA"))
def activated_velora(draft: Draft) -> None:
    _invoked(draft, velora_config={"num_groups": 2})


@bad_config(Code.UNSUPPORTED_FEATURE, words=("'monteclora_config'", "MonteCLoRA"))
def activated_monteclora(draft: Draft) -> None:
    _invoked(draft, monteclora_config={"samples": 2})


@bad_weights(Code.UNSUPPORTED_FEATURE, words=("embed_tokens", "of an embedding", WITH))
def activated_embedding(draft: Draft) -> None:
    add_embedding(draft)
    _invoked(draft)


@bad_config(
    Code.CONFIG_VALUE, Code.CONFIG_VALUE, words=("'bias' is 'some'", "'none', 'all' or 'lora_only'")
)
def activated_wrong_in_two_ways(draft: Draft) -> None:
    _invoked(draft, (-3,), bias="some")
