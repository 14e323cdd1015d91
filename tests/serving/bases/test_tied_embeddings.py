"""A model whose embedding is its head: adapters of either, and of both, answer as PEFT's do."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.attacks.poison import NAME, poisoned

from ..engine import answer, assert_as_peft, running_engine
from ..models.recipes import EMBEDDING_RECIPE, LINEAR_RECIPES, AdapterRecipe
from ..models.scenarios import build_scenario
from ..models.tiny_models import write_llama

pytestmark = pytest.mark.serving

RECIPES = (
    LINEAR_RECIPES[1],
    EMBEDDING_RECIPE,
    AdapterRecipe("embedding-r5", ("embed_tokens",), rank=5, gain=1.0),
    AdapterRecipe("head-r16", ("lm_head",), rank=16, gain=1.0),
)


@pytest.mark.smoke("`embed_tokens` and `lm_head` that are tied")
def test_answers_are_pefts_beside_adapters_that_fail(tmp_path: Path) -> None:
    tied = build_scenario(tmp_path, partial(write_llama, tied=True, seed=4), RECIPES, lengths=(7,))
    failing = {
        "gone": tmp_path / "gone",
        NAME: poisoned(tied.adapters[RECIPES[0].name], tmp_path / NAME, "float32"),
    }
    tied = replace(tied, adapters={**tied.adapters, **failing})
    good = [*tied.cases]
    random.Random(2).shuffle(good)
    bad = [replace(good[0], adapter=name) for name in failing]
    with running_engine(tied.base, in_process=True, max_loras=2, max_cpu_loras=3) as llm:
        outputs = answer(llm, tied, [*good[:5], *bad, *good[5:]])
    assert_as_peft([*outputs[:5], *outputs[7:]], good)
    gone, poison = (str(output.outputs[0].stop_reason) for output in outputs[5:7])
    assert "gone" in gone
    assert "quarantined" in poison
