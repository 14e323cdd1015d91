"""Adapters, blends of them, and prompts; answered by PEFT, which makes the blends with `cat`."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .cases import MIN_MARGIN, NEW_TOKENS, Case, Scenario
from .peft_reference import PeftReference
from .recipes import LINEAR_RECIPES, AdapterRecipe
from .tiny_adapters import write_adapters
from .tiny_models import write_llama

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

PARTS: tuple[AdapterRecipe, ...] = LINEAR_RECIPES[:4]
"""All linear layers; two of them; ranks and alphas by pattern; rank-stabilised."""

# PEFT takes `use_rslora` of a blend from its first part, and scales all of it wrongly if that is
# set: those that are come later.
BLENDS: Mapping[str, Mapping[str, float]] = {
    "two": {"all-linear-r8": 0.7, "qv-r5": 0.5},
    "three": {"patterns": 1.2, "rslora-r16": -0.4, "qv-r5": 0.3},
    "all": {"qv-r5": 0.4, "rslora-r16": 0.3, "patterns": 0.3, "all-linear-r8": 0.2},
    "weaker": {"all-linear-r8": 0.6},
}
LENGTHS = (7, 60)
_TRIES = 20


@dataclass(frozen=True)
class BlendScenario(Scenario):
    """Cases of adapters, of blends by their names here, and of the base model."""

    def request(self, name: str | None) -> "LoRARequest | None":
        """What asks for an adapter or a blend."""
        from vllm.lora.request import LoRARequest

        from vllm_multilora.integration.blends import blended

        if name is None:
            return None
        if name in self.adapters:
            return LoRARequest(name, self.adapter_id(name), str(self.adapters[name]))
        parts = ((self.request(part), weight) for part, weight in BLENDS[name].items())
        return blended((part, weight) for part, weight in parts if part is not None)


def blend_scenario(root: Path) -> BlendScenario:
    """The adapters, and a case of every length for each of them, each blend and the base model."""
    base = write_llama(root / "base", positions=256)
    adapters = write_adapters(base, root, PARTS)
    reference = blending_reference(base, adapters)
    return BlendScenario(base, adapters, tuple(_cases(reference, list(adapters))))


def blending_reference(base: Path, adapters: Mapping[str, Path]) -> PeftReference:
    """A reference that has the blends, too."""
    reference = PeftReference(base, adapters)
    for name, weights in BLENDS.items():
        reference.blend(name, weights)
    return reference


def _cases(reference: PeftReference, adapters: list[str]) -> Iterator[Case]:
    source = random.Random(0)
    names: list[str | None] = [None, *adapters, *BLENDS]
    for length in LENGTHS:
        for name in names:
            yield _decisive_case(reference, name, names, length, source)


def _decisive_case(
    reference: PeftReference,
    name: str | None,
    names: list[str | None],
    length: int,
    source: random.Random,
) -> Case:
    """A prompt with one answer, which none of the others gives."""
    for _ in range(_TRIES):
        prompt = tuple(source.randrange(240) for _ in range(length))
        (expected,) = reference.generate(name, [prompt], NEW_TOKENS)
        if expected.min_margin < MIN_MARGIN:
            continue
        others = [
            reference.generate(other, [prompt], NEW_TOKENS)[0] for other in names if other != name
        ]
        if expected.tokens not in [other.tokens for other in others]:
            return Case(name, prompt, expected)
    raise LookupError(f"no prompt of {length} tokens has a decisive answer for {name!r}")
