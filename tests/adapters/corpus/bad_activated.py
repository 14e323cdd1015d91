"""Activated adapters whose invocation is wrong, or that PEFT would not activate."""

import torch

from vllm_multilora.adapters.problems import Code

from .cases import Change, add_bad
from .draft import CONFIG, PREFIX, Q0, WEIGHTS, Draft, add_embedding, edited
from .llama_layout import VOCABULARY

KEY = "alora_invocation_tokens"
VALUE, UNSUPPORTED = Code.CONFIG_VALUE, Code.UNSUPPORTED_FEATURE
WITH = f"with '{KEY}'"
BIAS = {f"{PREFIX}{Q0}.bias": torch.zeros(256)}
BIAS_OF_B = {f"{PREFIX}{Q0}.lora_B.bias": torch.ones(256)}


def invoked(
    tokens: object = (5, 6), tensors: dict[str, torch.Tensor] | None = None, **config: object
) -> Change:
    return edited(tensors, **{KEY: tokens}, **config)


def activated_embedding(draft: Draft) -> None:
    add_embedding(draft)
    invoked()(draft)


add_bad(
    CONFIG,
    {
        "invocation-a-text": (invoked("<>"), VALUE, f"'{KEY}' is '<>'", "a list of token ids"),
        "invocation-an-object": (invoked({"5": 6}), VALUE, f"'{KEY}' is {{'5': 6}}"),
        "invocation-empty": (invoked(()), VALUE, f"'{KEY}' is a list of 0", "1 to 64 token ids"),
        "invocation-too-long": (invoked((*range(65),)), VALUE, f"'{KEY}' is a list of 65"),
        "invocation-with-a-text": (invoked((5, "6")), VALUE, f"{KEY}['1'] is '6'", "a token id"),
        "invocation-with-a-fraction": (invoked((5.0,)), VALUE, f"{KEY}['0'] is 5.0", "a token id"),
        "invocation-with-a-boolean": (invoked((5, True)), VALUE, f"{KEY}['1'] is True"),
        "invocation-in-a-batch": (invoked(((5, 6),)), VALUE, f"{KEY}['0'] is [5, 6]"),
        "invocation-negative": (invoked((5, -1)), VALUE, f"{KEY}['1'] is -1"),
        "invocation-beyond-integers": (invoked((10**30,)), VALUE, f"{KEY}['0'] is 1000"),
        "invocation-beyond-the-vocabulary": (
            invoked((5, VOCABULARY)),
            *(Code.WRONG_VOCABULARY, KEY, f"ids below {VOCABULARY}", "another tokenizer"),
        ),
        "activated-classifier": (
            invoked(task_type="SEQ_CLS"),
            *(UNSUPPORTED, "'task_type' is 'SEQ_CLS'", f"'CAUSAL_LM' {WITH}"),
        ),
        "activated-without-a-task": (invoked(task_type=None), UNSUPPORTED, "'task_type' is None"),
        "activated-dora": (invoked(use_dora=True), UNSUPPORTED, "'use_dora' is True"),
        "activated-bias-of-b": (
            invoked(tensors=BIAS_OF_B, lora_bias=True),
            *(UNSUPPORTED, "'lora_bias' is True"),
        ),
        "activated-head": (
            invoked(modules_to_save=["score"]),
            *(UNSUPPORTED, "'modules_to_save' is ['score']", "head"),
        ),
        "activated-parameters": (
            invoked(target_parameters=["mlp.experts.gate_up_proj"]),
            *(UNSUPPORTED, "'target_parameters'", "linear layers only"),
        ),
        "activated-mica": (
            invoked(init_lora_weights="mica"),
            *(UNSUPPORTED, "'init_lora_weights' is 'mica'", "MiCA"),
        ),
        "activated-velora": (
            invoked(velora_config={"num_groups": 2}),
            *(UNSUPPORTED, "'velora_config'", "VeLoRA"),
        ),
        "activated-monteclora": (
            invoked(monteclora_config={"samples": 2}),
            *(UNSUPPORTED, "'monteclora_config'", "MonteCLoRA"),
        ),
        "activated-wrong-in-two-ways": (
            invoked((-3,), bias="some"),
            *((VALUE, VALUE), "'bias' is 'some'", "'none', 'all' or 'lora_only'"),
        ),
    },
)
add_bad(
    WEIGHTS,
    {
        "activated-bias": (invoked(tensors=BIAS, bias="lora_only"), UNSUPPORTED, "'bias': 'none'"),
        "activated-embedding": (
            activated_embedding,
            *(UNSUPPORTED, "embed_tokens", "of an embedding", WITH),
        ),
    },
)
