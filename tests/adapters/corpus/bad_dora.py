"""DoRA adapters that are wrong in one way, for a server that takes right ones."""

import torch

from vllm_multilora.adapters.problems import Code

from .cases import BAD_DORA, Change, add_bad
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
    edited,
    name_of,
    with_value,
)
from .llama_layout import HIDDEN, MODULES, VOCABULARY

VALUE, UNSUPPORTED, HALF = Code.CONFIG_VALUE, Code.UNSUPPORTED_FEATURE, Code.HALF_MISSING
SHAPE, DTYPE = Code.WRONG_SHAPE, Code.WRONG_DTYPE
VECTOR = "lora_magnitude_vector"


def magnitude_of(module: str) -> str:
    """The name that PEFT gives to a linear module's magnitudes."""
    return f"{PREFIX}{module}.{VECTOR}"


def make_dora(draft: Draft) -> Draft:
    """Gives every linear module of the base model its magnitudes."""
    draft.config["use_dora"] = True
    generator = torch.Generator().manual_seed(50)
    for module, (_, outputs) in MODULES.items():
        if name_of(module, "A") in draft.tensors:
            draft.tensors[magnitude_of(module)] = 0.5 + torch.rand(outputs, generator=generator)
    return draft


def _add(file: str, rows: dict[str, tuple]) -> None:
    """Registers changes of a DoRA adapter that is right."""

    def on_dora(change: Change) -> Change:
        return lambda draft: change(make_dora(draft))

    rows = {name: (on_dora(change), *others) for name, (change, *others) in rows.items()}
    add_bad(file, rows, of=BAD_DORA)


M, A, B = magnitude_of(Q0), name_of(Q0, "A"), name_of(Q0, "B")


def magnitude(value: torch.Tensor, module: str = Q0) -> Change:
    return edited({magnitude_of(module): value})


def embedding(draft: Draft) -> None:
    add_embedding(draft)
    magnitude(torch.ones(HIDDEN), "model.embed_tokens")(draft)


def head(draft: Draft) -> None:
    add_head(draft)
    magnitude(torch.ones(VOCABULARY), "lm_head")(draft)


def wrong_in_three_ways(draft: Draft) -> None:
    edited({M: None, magnitude_of(V1): torch.ones(63)})(draft)
    draft.tensors[magnitude_of(DOWN2)][0] = float("nan")


_add(
    CONFIG,
    {
        "use-dora-a-text": (edited(use_dora="yes"), VALUE, "'use_dora' is 'yes'", "true or false"),
        "use-dora-a-number": (edited(use_dora=1), VALUE, "'use_dora' is 1", "true or false"),
        "dora-activated": (
            edited(alora_invocation_tokens=[5, 6]),
            *(UNSUPPORTED, "'use_dora' is True", "activated LoRA"),
        ),
    },
)
_add(
    WEIGHTS,
    {
        "use-dora-false": (
            edited(use_dora=False),
            *(Code.UNKNOWN_TENSOR, VECTOR, "a magnitude of DoRA", "'use_dora': true"),
        ),
        "no-magnitudes": (
            edited(dict.fromkeys(map(magnitude_of, MODULES))),
            *(HALF, f"without its {VECTOR}", "all three"),
        ),
        "one-magnitude-missing": (edited({M: None}), HALF, A, f"without its {VECTOR}"),
        "a-b-missing": (edited({B: None}), HALF, "without its lora_B", "all three"),
        "a-magnitude-alone": (edited({A: None, B: None}), (HALF, HALF), M, "without its lora_A"),
        "magnitude-too-short": (
            magnitude(torch.ones(255)),
            *(SHAPE, M, "the shape [255]", "[256]: one magnitude for each"),
        ),
        "magnitude-a-scalar": (magnitude(torch.tensor(1.0)), SHAPE, M, "the shape []", "[256]"),
        # As norms over the other dimension would be.
        "magnitudes-of-inputs": (
            magnitude(torch.ones(176), DOWN2),
            *(SHAPE, magnitude_of(DOWN2), "[176]", f"[{HIDDEN}]"),
        ),
        "magnitude-empty": (magnitude(torch.ones(0)), Code.EMPTY_TENSOR, M, "no elements"),
        "magnitude-of-integers": (
            magnitude(torch.ones(256, dtype=torch.int64)),
            *(DTYPE, M, "int64", "float32"),
        ),
        "magnitude-nan": (
            with_value(M, (7,), float("nan")),
            *(Code.NOT_FINITE, M, "1 of 256 values", "the first at [7]"),
        ),
        "magnitude-twice": (
            edited({f"{M}.default.weight": torch.ones(256)}),
            *(Code.DUPLICATE_TENSOR, VECTOR, f"one {VECTOR}"),
        ),
        "dora-of-an-embedding": (
            embedding,
            *(UNSUPPORTED, "embed_tokens", "of an embedding", "'use_dora'"),
        ),
        "dora-of-the-head": (head, UNSUPPORTED, "lm_head", "of an output head", "'use_dora'"),
        "dora-with-biases": (
            edited({f"{PREFIX}{Q0}.bias": torch.zeros(256)}, bias="lora_only"),
            *(UNSUPPORTED, "'bias': 'none'"),
        ),
        "dora-wrong-in-three-ways": (
            wrong_in_three_ways,
            *((HALF, SHAPE, Code.NOT_FINITE), A, VECTOR),
        ),
    },
)
