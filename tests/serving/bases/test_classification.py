"""Classes and scores: each adapter's are PEFT's, its own head's where it brings one."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.attacks.poison import poisoned
from vllm_multilora.integration.patching.version import installed_version

from ..engine import BEFORE_0_31, BEFORE_0_32, running_engine
from ..models.recipes import CLASSIFIER_RECIPES, TOKEN_CLASSIFIER_RECIPES, AdapterRecipe
from ..models.tiny_adapters import write_adapters
from ..models.tiny_models import VOCAB_SIZE, write_classifier, write_token_classifier

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

GONE, POISON = "gone", "poison"
PAIRS = ((3, 4), (12, 11), (25, 17))
"""Tokens of a query and of a document, the last ones more than a step takes in."""

Pair = tuple[list[int], list[int]]

has_token_heads = pytest.mark.skipif(
    (installed_version() or "0").split(".") < ["0", "33"],
    reason="vLLM before 0.33 has adapters of no model with heads for tokens",
)

SERVED_RECIPES = CLASSIFIER_RECIPES[-1:] if BEFORE_0_31 else CLASSIFIER_RECIPES
"""Adapters of classifiers that vLLM serves: before 0.31, those that leave the head as it is."""


@dataclass(frozen=True)
class Classifier:
    """A base checkpoint and its adapters, two of which fail."""

    base: Path
    adapters: Mapping[str, Path]
    auto: Any

    def lora(self, name: str | None) -> "LoRARequest | None":
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        return LoRARequest(name, 1 + list(self.adapters).index(name), str(self.adapters[name]))

    def logits(self, name: str | None, prompt: Sequence[int]) -> torch.Tensor:
        """What PEFT and transformers say of a prompt: float32 of shape [labels].

        Of shape [tokens, labels] where the model tells classes of tokens.
        """
        from peft import PeftConfig, PeftModel

        model = self.auto.from_pretrained(self.base, dtype=torch.float32)
        if name is not None:
            config = PeftConfig.from_pretrained(self.adapters[name])
            model = PeftModel.from_pretrained(model, self.adapters[name], config=config)
        with torch.inference_mode():
            return model.eval()(input_ids=torch.tensor([prompt])).logits[0]

    def logits_of_tokens(self, name: str | None, prompt: Sequence[int]) -> torch.Tensor:
        """As `logits`, of each token's state: float32 of shape [tokens, labels]."""
        ends = range(1, 1 + len(prompt))
        return torch.stack([self.logits(name, prompt[:end]) for end in ends])


def classifier(
    root: Path, labels: int, recipes: Sequence[AdapterRecipe] = SERVED_RECIPES
) -> Classifier:
    from transformers import AutoModelForSequenceClassification as Auto

    base = write_classifier(root / "base", labels=labels)
    return with_adapters(base, root, recipes, Auto, part="v_proj")


def token_classifier(root: Path, labels: int) -> Classifier:
    from transformers import AutoModelForTokenClassification as Auto

    base = write_token_classifier(root / "base", labels=labels)
    return with_adapters(base, root, TOKEN_CLASSIFIER_RECIPES, Auto, part="value")


def with_adapters(
    base: Path, root: Path, recipes: Sequence[AdapterRecipe], auto: Any, *, part: str
) -> Classifier:
    """A classifier with its adapters; what overflows is a part of the first one's copy."""
    adapters = write_adapters(base, root, recipes, auto=auto)
    adapters[POISON] = poisoned(adapters[recipes[0].name], root / POISON, "float32", part=part)
    return Classifier(base, {**adapters, GONE: root / GONE}, auto)


def mixed(
    model: Classifier, pairs: Sequence[Pair], *, fail: bool = True
) -> list[tuple[str | None, Pair]]:
    """Requests of the base model and of every adapter for each pair, in any order.

    Args:
        model: The model.
        pairs: The pairs.
        fail: Whether some are for adapters that fail.
    """
    names = [name for name in (None, *model.adapters) if fail or name not in (GONE, POISON)]
    requests = [(name, pair) for pair in pairs for name in names]
    random.Random(1).shuffle(requests)
    return requests


def asked(model: Classifier, requests: Sequence[tuple[str | None, Pair]]) -> dict[str, Any]:
    """Arguments of vLLM's calls that put both texts of a pair into one prompt."""
    return {
        "prompts": [{"prompt_token_ids": [*query, *doc]} for _, (query, doc) in requests],
        "lora_request": [model.lora(name) for name, _ in requests],
        "use_tqdm": False,
    }


def random_pairs() -> list[Pair]:
    source = random.Random(0)

    def tokens(length: int) -> list[int]:
        return [source.randrange(VOCAB_SIZE) for _ in range(length)]

    return [(tokens(query), tokens(document)) for query, document in PAIRS]


def text(tokens: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in tokens)


def error_of(answer: Any) -> Any:
    """Why a request failed; None if it did not. Before 0.32, answers have the field only then."""
    return getattr(answer, "error", None)


def assert_only_the_guilty_fail(name: str | None, error: Any) -> None:
    if name == GONE:
        assert error.code == "gone", error
    elif name == POISON:
        assert "quarantined" in error.message, error
    else:
        assert error is None, (name, error)


@pytest.mark.smoke("scoring and classification of requests")
def test_classes_equal_pefts_beside_adapters_that_fail(tmp_path: Path) -> None:
    model = classifier(tmp_path, labels=3)
    requests = mixed(model, random_pairs(), fail=not BEFORE_0_32)  # it has no place for a reason
    with running_engine(
        model.base,
        in_process=True,
        runner="pooling",
        max_loras=2,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
    ) as llm:
        answers = llm.classify(**asked(model, requests))
    seen = set()
    for answer, (name, (query, document)) in zip(answers, requests, strict=True):
        assert_only_the_guilty_fail(name, error_of(answer))
        if error_of(answer) is None:
            expected = model.logits(name, [*query, *document]).softmax(dim=0)
            found = torch.tensor(answer.outputs.probs)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            seen.add(tuple(round(p, 3) for p in answer.outputs.probs))
    assert len(seen) == len(PAIRS) * (1 + len(SERVED_RECIPES)), "a mix-up would show"


@pytest.mark.smoke("scoring and classification of requests")
def test_a_cross_encoders_scores_equal_pefts_beside_adapters_that_fail(tmp_path: Path) -> None:
    model = classifier(tmp_path, labels=1)
    requests = mixed(model, random_pairs(), fail=not BEFORE_0_32)  # there, one ends all of the call
    with running_engine(
        model.base,
        in_process=True,
        runner="pooling",
        skip_tokenizer_init=False,
        max_loras=2,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
    ) as llm:
        answers = llm.score(
            [f"{text(query)} " for _, (query, _) in requests],  # vLLM puts nothing between them
            [text(document) for _, (_, document) in requests],
            lora_request=[model.lora(name) for name, _ in requests],
            use_tqdm=False,
        )
    seen = set()
    for answer, (name, (query, document)) in zip(answers, requests, strict=True):
        assert_only_the_guilty_fail(name, error_of(answer))
        if error_of(answer) is None:
            expected = model.logits(name, [*query, *document]).sigmoid().item()
            assert answer.outputs.score == pytest.approx(expected, rel=1e-3), name
            seen.add(round(expected, 3))
    assert len(seen) == len(PAIRS) * (1 + len(SERVED_RECIPES)), "a mix-up would show"


@pytest.mark.smoke("classification of tokens")
def test_tokens_classes_equal_pefts_and_heads_that_vllm_cannot_apply_are_refused(
    tmp_path: Path,
) -> None:
    """vLLM 0.33 does apply adapters' own heads to tokens, for a few models."""
    model = classifier(tmp_path, labels=3, recipes=CLASSIFIER_RECIPES)
    requests = mixed(model, [([5, 6, 7], [250, 21])])
    served = {None, "base-head-r64"}
    with running_engine(
        model.base,
        in_process=True,
        runner="pooling",
        pooler_config={"task": "token_classify"},
        max_loras=2,
        enable_prefix_caching=False,
    ) as llm:
        answers = llm.encode(pooling_task="token_classify", **asked(model, requests))
    for answer, (name, (query, document)) in zip(answers, requests, strict=True):
        if name in served:
            assert error_of(answer) is None, (name, error_of(answer))
            expected = model.logits_of_tokens(name, [*query, *document]).softmax(dim=-1)
            torch.testing.assert_close(answer.outputs.data, expected, rtol=1e-3, atol=1e-5)
        elif BEFORE_0_31:  # whose answers have no place for a reason
            assert not answer.outputs.data.numel(), name
        elif name == GONE:
            assert_only_the_guilty_fail(name, error_of(answer))
        else:  # the adapter that overflows has a head of its own, too
            assert "token_classify" in error_of(answer).message, name


@has_token_heads
@pytest.mark.smoke("classification of tokens")
def test_tokens_classes_of_adapters_own_heads_equal_pefts_beside_adapters_that_fail(
    tmp_path: Path,
) -> None:
    model = token_classifier(tmp_path, labels=3)
    requests = mixed(model, random_pairs())
    with running_engine(
        model.base,
        in_process=True,
        runner="pooling",
        max_loras=2,
        max_model_len=96,
        max_num_batched_tokens=96,  # several requests a step, each with all of its tokens
        enable_prefix_caching=False,
    ) as llm:
        answers = llm.encode(pooling_task="token_classify", **asked(model, requests))
    seen: dict[int, list[torch.Tensor]] = {}
    for answer, (name, (query, document)) in zip(answers, requests, strict=True):
        assert_only_the_guilty_fail(name, error_of(answer))
        if error_of(answer) is None:
            expected = model.logits(name, [*query, *document]).softmax(dim=-1)
            torch.testing.assert_close(answer.outputs.data, expected, rtol=1e-3, atol=1e-5)
            seen.setdefault(len(expected), []).append(expected.flatten())
    for of_one_prompt in seen.values():
        assert torch.pdist(torch.stack(of_one_prompt)).min() > 0.1, "a mix-up would show"
