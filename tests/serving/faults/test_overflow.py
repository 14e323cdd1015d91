"""Many adapters through one slot, and a large one that pushes them out of host memory."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ..cache_probe import CacheProbe
from ..engine import answer, assert_as_peft, running_engine
from ..models.cases import Case, Scenario
from ..models.recipes import AdapterRecipe
from ..models.scenarios import build_scenario
from ..models.tiny_models import write_llama

pytestmark = [pytest.mark.serving, pytest.mark.slow]

ADAPTERS = int(os.environ.get("MULTILORA_TEST_ADAPTERS", "120"))
"""300 and more are for runs by hand."""

NEW_TOKENS = 4
"""With one slot, every token of every request is a step of its own."""

MAX_RANK = 256
LARGE = AdapterRecipe("large", rank=MAX_RANK, alpha=MAX_RANK)
KINDS = tuple(AdapterRecipe(f"kind-{n}", rank=1, alpha=2, gain=0.8) for n in range(10))


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Adapters of rank 1, of ten kinds, each with weights of its own; and a large one."""
    root = tmp_path_factory.mktemp("crowd")
    kinds = build_scenario(
        root, write_llama, (*KINDS, LARGE), lengths=(11,), min_margin=0.02, new_tokens=NEW_TOKENS
    )
    adapters, cases = {LARGE.name: kinds.adapters[LARGE.name]}, list(kinds.cases_of(LARGE.name))
    for number in range(ADAPTERS):
        kind, name = KINDS[number % len(KINDS)].name, f"customer-{number}"
        adapters[name] = _copy(kinds.adapters[kind], root / name, number)
        (case,) = kinds.cases_of(kind)
        cases.append(replace(case, adapter=name))
    return Scenario(kinds.base, adapters, tuple(cases))


def _copy(source: Path, target: Path, number: int) -> Path:
    """The same adapter with a difference too small to be seen: equal ones would share memory."""
    target.mkdir()
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    os.link(source / config, target / config)
    tensors = load_file(source / weights)
    first = tensors[min(tensors)]
    first.view(-1)[0] *= 1 + 1e-6 * number
    save_file(tensors, target / weights, {"format": "pt"})
    return target


def test_all_answer_right_before_and_after_they_were_pushed_out(crowd: Scenario) -> None:
    large, *small = crowd.cases
    room = 1.25 * (crowd.adapters[LARGE.name] / "adapter_model.safetensors").stat().st_size
    with running_engine(
        crowd.base,
        in_process=True,
        max_loras=1,
        max_cpu_loras=ADAPTERS,
        max_lora_rank=MAX_RANK,
        enable_prefix_caching=False,
        additional_config={"multilora": {"cpu_cache_gib": room / 2**30}},
    ) as llm:
        probe = CacheProbe(llm)

        def assert_right(cases: Sequence[Case]) -> None:
            assert_as_peft(answer(llm, crowd, cases, new_tokens=NEW_TOKENS), cases)

        assert_right(small)
        before = probe.look()
        assert before.host_bytes <= room
        assert_right([large])
        pushed_out = before.host - probe.look().host
        assert len(pushed_out) > len(before.host) / 2
        assert_right(small)
        assert pushed_out <= probe.look().reads.keys()
