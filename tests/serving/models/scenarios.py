"""Builds scenarios: writes the checkpoints, and asks PEFT for the answers."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .cases import MIN_MARGIN, NEW_TOKENS, PROMPT_LENGTHS, Case, Continuation, Key, Prompt, Scenario
from .peft_reference import PeftReference, reference_continuations
from .recipes import DORA_RECIPES, EMBEDDING_RECIPE, FLEET_RECIPES, LINEAR_RECIPES, AdapterRecipe
from .tiny_adapters import write_adapter, write_adapters
from .tiny_models import VOCAB_SIZE, write_llama, write_qwen2

_CANDIDATES = 6


def llama_scenario(root: Path) -> Scenario:
    """A Llama with every recipe, the one for embedding and head included."""
    return build_scenario(root, write_llama, (*LINEAR_RECIPES, EMBEDDING_RECIPE))


def qwen2_scenario(root: Path) -> Scenario:
    """A Qwen2 with the recipes for linear layers; vLLM lists no embedding modules for it."""
    return build_scenario(root, write_qwen2, LINEAR_RECIPES)


def dora_scenario(root: Path) -> Scenario:
    """A Qwen2, which has biases, with DoRA adapters, plain ones and an activated one."""
    recipes = (*DORA_RECIPES, LINEAR_RECIPES[0], LINEAR_RECIPES[2])
    scenario = build_scenario(root, write_qwen2, recipes, lengths=(7, 40))
    recipe = AdapterRecipe("activated", invocation=(250, 17))
    folder = write_adapter(scenario.base, root / recipe.name, recipe, seed=90)
    reference = PeftReference(scenario.base, {recipe.name: folder})
    prompts = [(*prompt, *recipe.invocation, 7, 8, 9) for prompt in _candidate_prompts((23,))]
    answers = reference.generate(recipe.name, prompts, NEW_TOKENS)
    cases = [
        Case(recipe.name, prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.min_margin >= MIN_MARGIN
    ]
    adapters = {**scenario.adapters, recipe.name: folder}
    return Scenario(scenario.base, adapters, (*scenario.cases, *cases[:2]))


def fleet_scenario(root: Path) -> Scenario:
    """A Llama with many adapters of ranks from 8 to 64, and one case each."""
    # With so many there is always one to which few prompts have a decisive answer.
    return build_scenario(root, write_llama, FLEET_RECIPES, lengths=(11,), min_margin=0.02)


def build_scenario(
    root: Path,
    write_base: Callable[[Path], Path],
    recipes: Sequence[AdapterRecipe],
    *,
    lengths: Sequence[int] = PROMPT_LENGTHS,
    min_margin: float = MIN_MARGIN,
    new_tokens: int = NEW_TOKENS,
    derive: Callable[[Mapping[str, Path]], Mapping[str, Path]] | None = None,
) -> Scenario:
    """Writes the checkpoints below ``root`` and answers the prompts with PEFT.

    Args:
        root: An empty directory.
        write_base: Writes the base checkpoint into a directory.
        recipes: The adapters to write.
        lengths: Of the prompts, in tokens; one case of each for every adapter.
        min_margin: Least logit margin of every step of a case.
        new_tokens: Of each continuation.
        derive: Makes more adapters from these, by name.

    Raises:
        LookupError: No candidate prompt of some length can be a case of some adapter.
    """
    base = write_base(root / "base")
    adapters = write_adapters(base, root, recipes)
    adapters |= derive(adapters) if derive is not None else {}
    prompts = _candidate_prompts(lengths)
    truth = reference_continuations(base, adapters, prompts, new_tokens)
    # Neighbours differ in their adapter, so that a batch taken from the front is mixed.
    cases = [
        _first_case(
            name, [prompt for prompt in prompts if len(prompt) == length], truth, min_margin
        )
        for length in lengths
        for name in (None, *adapters)
    ]
    return Scenario(base, adapters, tuple(cases))


def _first_case(
    name: str | None, prompts: Sequence[Prompt], truth: Mapping[Key, Continuation], margin: float
) -> Case:
    """The first prompt whose continuation under ``name`` is decisive and unlike all others."""
    for prompt in prompts:
        answer = truth[name, prompt]
        others = {
            other.tokens for key, other in truth.items() if key[1] == prompt and key[0] != name
        }
        if answer.min_margin >= margin and answer.tokens not in others:
            return Case(name, prompt, answer)
    raise LookupError(
        f"none of {len(prompts)} prompts of {len(prompts[0])} tokens is a case of {name!r}: each "
        f"has a step with a logit margin under {margin}, or another adapter's continuation"
    )


def _candidate_prompts(lengths: Sequence[int]) -> list[Prompt]:
    """Random prompts of each length; a scenario takes the first that fits each adapter."""
    source = random.Random(0)
    return [
        tuple(source.randrange(VOCAB_SIZE) for _ in range(length))
        for length in lengths
        for _ in range(_CANDIDATES)
    ]
