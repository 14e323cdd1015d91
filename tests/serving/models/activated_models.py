"""Activated adapters, plain ones, and prompts that invoke them in every way; answered by PEFT."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .cases import MIN_MARGIN, NEW_TOKENS, Case, Prompt, Scenario
from .peft_reference import PeftReference
from .recipes import AdapterRecipe
from .tiny_adapters import write_adapter
from .tiny_models import VOCAB_SIZE, write_llama

CHUNK = 24
"""Tokens of a step, in engines that compute prompts in parts."""

RECIPES = (
    AdapterRecipe("check", invocation=(250, 17, 251)),
    AdapterRecipe("rewrite", targets=("q_proj", "v_proj"), rank=5, gain=0.8, invocation=(252,)),
    AdapterRecipe("judge", rank=16, rslora=True, invocation=(253, 253)),
    AdapterRecipe("head", targets=("q_proj", "down_proj", "lm_head"), invocation=(254, 19)),
)
TWIN = "check-everywhere"
"""The weights of `check`, acting on whole prompts."""
_TRIES = 8


@dataclass(frozen=True)
class Shape:
    """Where a prompt has its adapter's invocation.

    Attributes:
        name: For people.
        before: Tokens before its last occurrence.
        after: Tokens after it.
        earlier: Where it occurs before that; None: nowhere.
    """

    name: str
    before: int
    after: int
    earlier: int | None = None

    def prompt(self, source: random.Random, invocation: tuple[int, ...]) -> Prompt:
        words = [source.randrange(240) for _ in range(self.before + self.after)]
        if self.earlier is not None:
            words[self.earlier : self.earlier + len(invocation)] = invocation
        return tuple(words[: self.before]) + invocation + tuple(words[self.before :])


SHAPES = (
    Shape("first token", 0, 20),
    Shape("last tokens", 37, 0),
    Shape("begins with a chunk", CHUNK, 15),
    Shape("across chunks", CHUNK - 1, 9),
    Shape("inside a chunk", 40, 12),
    Shape("begins with a block", 32, 5),
    Shape("twice", 41, 8, earlier=6),
    Shape("twice in a block", 50, 20, earlier=36),
)


def activated_scenario(root: Path) -> Scenario:
    """The adapters, a plain twin of the first, and a case of every shape for each of them."""
    base = write_llama(root / "base", positions=4096)
    twin = replace(RECIPES[0], name=TWIN, invocation=())
    adapters = {
        recipe.name: write_adapter(base, root / recipe.name, recipe, seed=seed)
        for seed, recipe in [*enumerate(RECIPES), (0, twin)]
    }
    reference = PeftReference(base, adapters)
    return Scenario(base, adapters, tuple(_cases(reference)))


def _cases(reference: PeftReference) -> Iterator[Case]:
    source = random.Random(0)
    for shape in SHAPES:
        for recipe in RECIPES:
            yield from _decisive_cases(reference, recipe, shape, source)


def _decisive_cases(
    reference: PeftReference, recipe: AdapterRecipe, shape: Shape, source: random.Random
) -> Iterator[Case]:
    """A case of the adapter; and its prompt without adapter, and with the twin on all of it."""
    for _ in range(_TRIES):
        prompt = shape.prompt(source, recipe.invocation)
        answers = {
            name: reference.generate(name, [prompt], NEW_TOKENS)[0]
            for name in (recipe.name, None, TWIN)
        }
        expected = answers[recipe.name]
        others = [answers[None], answers[TWIN]] if shape.before else [answers[None]]
        if expected.min_margin < MIN_MARGIN or expected.tokens in [each.tokens for each in others]:
            continue
        for name, answer in answers.items():
            if answer.min_margin >= MIN_MARGIN:
                yield Case(name, prompt, answer)
        return
    raise LookupError(f"no prompt with {shape.name!r} has a decisive answer for {recipe.name!r}")


def invocation_of(name: str) -> tuple[int, ...]:
    """The tokens that activate an adapter."""
    return next(recipe.invocation for recipe in RECIPES if recipe.name == name)


assert all(token < VOCAB_SIZE for recipe in RECIPES for token in recipe.invocation)
