"""DoRA adapters that are wrong in one way, for a server that takes right ones."""

from collections.abc import Callable

import torch

from vllm_multilora.adapters.problems import Code

from .cases import BAD_DORA, Change, bad
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
    name_of,
)
from .llama_layout import HIDDEN, MODULES, VOCABULARY

_KIND = "'use_dora'"


def magnitude_of(module: str) -> str:
    """The name that PEFT gives to a linear module's magnitudes."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def make_dora(draft: Draft) -> Draft:
    """Gives every linear module of the base model its magnitudes."""
    draft.config["use_dora"] = True
    generator = torch.Generator().manual_seed(50)
    for module, (_, outputs) in MODULES.items():
        if name_of(module, "A") in draft.tensors:
            draft.tensors[magnitude_of(module)] = 0.5 + torch.rand(outputs, generator=generator)
    return draft


def _bad(file: str, *codes: Code, words: tuple[str, ...]) -> Callable[[Change], Change]:
    """Registers a change of a DoRA adapter that is right."""

    def register(change: Change) -> Change:
        def changed(draft: Draft) -> Draft:
            whole = make_dora(draft)
            return change(whole) or whole

        changed.__name__ = change.__name__
        bad(file, *codes, words=words, of=BAD_DORA)(changed)
        return change

    return register


M = magnitude_of(Q0)


@_bad(
    WEIGHTS,
    Code.UNKNOWN_TENSOR,
    words=("lora_magnitude_vector", "a magnitude of DoRA", "'use_dora': true"),
)
def use_dora_false(draft: Draft) -> None:
    draft.config["use_dora"] = False


@_bad(CONFIG, Code.CONFIG_VALUE, words=("'use_dora' is 'yes'", "true or false"))
def use_dora_a_text(draft: Draft) -> None:
    draft.config["use_dora"] = "yes"


@_bad(CONFIG, Code.CONFIG_VALUE, words=("'use_dora' is 1", "true or false"))
def use_dora_a_number(draft: Draft) -> None:
    draft.config["use_dora"] = 1


@_bad(WEIGHTS, Code.HALF_MISSING, words=("without its lora_magnitude_vector", "all three"))
def no_magnitudes(draft: Draft) -> None:
    for module in MODULES:
        del draft.tensors[magnitude_of(module)]


@_bad(WEIGHTS, Code.HALF_MISSING, words=(name_of(Q0, "A"), "without its lora_magnitude_vector"))
def one_magnitude_missing(draft: Draft) -> None:
    del draft.tensors[M]


@_bad(WEIGHTS, Code.HALF_MISSING, words=("without its lora_B", "all three"))
def a_b_missing(draft: Draft) -> None:
    del draft.tensors[name_of(Q0, "B")]


@_bad(WEIGHTS, Code.HALF_MISSING, Code.HALF_MISSING, words=(M, "without its lora_A"))
def a_magnitude_alone(draft: Draft) -> None:
    for part in "AB":
        del draft.tensors[name_of(Q0, part)]


@_bad(WEIGHTS, Code.WRONG_SHAPE, words=(M, "the shape [255]", "[256]: one magnitude for each"))
def magnitude_too_short(draft: Draft) -> None:
    draft.tensors[M] = torch.ones(255)


@_bad(WEIGHTS, Code.WRONG_SHAPE, words=(M, "the shape [1, 256]", "[256]"))
def magnitude_a_row(draft: Draft) -> None:
    draft.tensors[M] = torch.ones(1, 256)


@_bad(WEIGHTS, Code.WRONG_SHAPE, words=(M, "the shape [256, 1]", "[256]"))
def magnitude_a_column(draft: Draft) -> None:
    draft.tensors[M] = torch.ones(256, 1)


@_bad(WEIGHTS, Code.WRONG_SHAPE, words=(M, "the shape []", "[256]"))
def magnitude_a_scalar(draft: Draft) -> None:
    draft.tensors[M] = torch.tensor(1.0)


@_bad(WEIGHTS, Code.WRONG_SHAPE, words=(magnitude_of(DOWN2), "[176]", f"[{HIDDEN}]"))
def magnitudes_of_inputs(draft: Draft) -> None:
    """As norms over the other dimension would be."""
    draft.tensors[magnitude_of(DOWN2)] = torch.ones(176)


@_bad(WEIGHTS, Code.EMPTY_TENSOR, words=(M, "no elements"))
def magnitude_empty(draft: Draft) -> None:
    draft.tensors[M] = torch.ones(0)


@_bad(WEIGHTS, Code.WRONG_DTYPE, words=(M, "int64", "float32"))
def magnitude_of_integers(draft: Draft) -> None:
    draft.tensors[M] = torch.ones(256, dtype=torch.int64)


@_bad(WEIGHTS, Code.WRONG_DTYPE, words=(M, "float64", "float32"))
def magnitude_of_doubles(draft: Draft) -> None:
    draft.tensors[M] = torch.ones(256, dtype=torch.float64)


@_bad(WEIGHTS, Code.NOT_FINITE, words=(M, "1 of 256 values", "the first at [7]"))
def magnitude_nan(draft: Draft) -> None:
    draft.tensors[M][7] = float("nan")


@_bad(WEIGHTS, Code.NOT_FINITE, words=(M, "2 of 256 values", "the first at [0]"))
def magnitude_infinite(draft: Draft) -> None:
    draft.tensors[M][:2] = float("inf")


@_bad(WEIGHTS, Code.DUPLICATE_TENSOR, words=("lora_magnitude_vector", "one lora_magnitude_vector"))
def magnitude_twice(draft: Draft) -> None:
    draft.tensors[f"{M}.default.weight"] = torch.ones(256)


@_bad(WEIGHTS, Code.UNKNOWN_MODULE, words=("lora_magnitude_vector", "for the module z_proj"))
def magnitude_of_no_module(draft: Draft) -> None:
    draft.tensors[magnitude_of("model.layers.0.self_attn.z_proj")] = torch.ones(8)


@_bad(WEIGHTS, Code.LAYER_OUT_OF_RANGE, words=("lora_magnitude_vector", "layer 9"))
def magnitude_of_no_layer(draft: Draft) -> None:
    draft.tensors[magnitude_of("model.layers.9.self_attn.q_proj")] = torch.ones(256)


@_bad(WEIGHTS, Code.MERGED_MODULE, words=("qkv_proj", "q_proj, k_proj, v_proj"))
def magnitude_of_a_merged_module(draft: Draft) -> None:
    draft.tensors[magnitude_of("model.layers.1.self_attn.qkv_proj")] = torch.ones(384)


@_bad(WEIGHTS, Code.UNSUPPORTED_FEATURE, words=("embed_tokens", "of an embedding", _KIND))
def dora_of_an_embedding(draft: Draft) -> None:
    add_embedding(draft)
    draft.tensors[magnitude_of("model.embed_tokens")] = torch.ones(HIDDEN)


@_bad(WEIGHTS, Code.UNSUPPORTED_FEATURE, words=("lm_head", "of an output head", _KIND))
def dora_of_the_head(draft: Draft) -> None:
    add_head(draft)
    draft.tensors[magnitude_of("lm_head")] = torch.ones(VOCABULARY)


@_bad(CONFIG, Code.UNSUPPORTED_FEATURE, words=("'use_dora' is True", "activated LoRA"))
def dora_activated(draft: Draft) -> None:
    draft.config["alora_invocation_tokens"] = [5, 6]


@_bad(WEIGHTS, Code.UNSUPPORTED_FEATURE, words=("'bias': 'none'",))
def dora_with_biases(draft: Draft) -> None:
    draft.config["bias"] = "lora_only"
    draft.tensors[f"{PREFIX}{Q0}.bias"] = torch.zeros(256)


@_bad(WEIGHTS, Code.RANK_NOT_AS_CONFIGURED, words=("the rank 8", "'r' and 'rank_pattern'"))
def dora_of_another_rank(draft: Draft) -> None:
    draft.config["rank_pattern"] = {"layers.0.self_attn.q_proj": 4}


@_bad(WEIGHTS, Code.FILE_SIZE, words=("from its header", "truncated"))
def dora_truncated(draft: Draft) -> None:
    def cut(folder) -> None:
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-64])

    draft.afterwards.append(cut)


@_bad(
    WEIGHTS,
    Code.HALF_MISSING,
    Code.WRONG_SHAPE,
    Code.NOT_FINITE,
    words=(name_of(Q0, "A"), "lora_magnitude_vector"),
)
def dora_wrong_in_three_ways(draft: Draft) -> None:
    del draft.tensors[M]
    draft.tensors[magnitude_of(V1)] = torch.ones(63)
    draft.tensors[magnitude_of(DOWN2)][0] = float("nan")
