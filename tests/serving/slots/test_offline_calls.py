"""What users of `LLM(...)` call for adapters: add, list, pin, remove, reload, ask."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ..cache_probe import CacheProbe
from ..engine import answer, assert_as_peft, generate, greedy, lora_request, running_engine
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.llm_engine import LLMEngine

pytestmark = pytest.mark.serving

NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES[:5])
FIRST, SECOND = NAMES[:2]
SLOTS, HOST_PLACES = 2, 4
LENGTH = 7
"""Tokens of a prompt."""


@pytest.fixture(scope="module")
def llm(llama: Scenario) -> "Iterator[LLM]":
    with running_engine(
        llama.base, in_process=True, max_loras=SLOTS, max_cpu_loras=HOST_PLACES
    ) as running:
        yield running


@pytest.fixture
def engine(llm: "LLM") -> "LLMEngine":
    """Its calls; it knows no adapters yet."""
    CacheProbe(llm)
    return llm.llm_engine


def case_of(llama: Scenario, name: str) -> Case:
    return next(case for case in llama.cases_of(name) if len(case.prompt) == LENGTH)


def numbers(llama: Scenario, *names: str) -> set[int]:
    return {llama.adapter_id(name) for name in names}


def assert_answers(llm: "LLM", llama: Scenario, *names: str) -> None:
    cases = [case_of(llama, name) for name in names]
    assert_as_peft(answer(llm, llama, cases), cases)


def test_what_is_added_is_listed_until_it_is_removed(
    llm: "LLM", engine: "LLMEngine", llama: Scenario
) -> None:
    """Whoever comes when host memory is full is served all the same, and pushes nobody out."""
    assert engine.list_loras() == set()
    for count, name in enumerate(NAMES[:HOST_PLACES], start=1):
        assert engine.add_lora(lora_request(llama, name)) is True
        assert engine.list_loras() == numbers(llama, *NAMES[:count])
    listed = numbers(llama, *NAMES[:HOST_PLACES])
    assert engine.add_lora(lora_request(llama, FIRST)) is True, "it is there already"
    late = NAMES[HOST_PLACES]
    assert engine.add_lora(lora_request(llama, late))
    assert engine.list_loras() == listed
    assert_answers(llm, llama, late)
    assert engine.list_loras() >= numbers(llama, late)
    for name in NAMES:
        assert engine.remove_lora(llama.adapter_id(name))
        assert not engine.remove_lora(llama.adapter_id(name))
    assert engine.list_loras() == set()


def test_pins_are_for_adapters_that_were_added_and_leave_a_slot(
    llm: "LLM", engine: "LLMEngine", llama: Scenario
) -> None:
    """With vLLM's kinds of error."""
    with pytest.raises(ValueError, match="was never added"):
        engine.pin_lora(llama.adapter_id(FIRST))
    for name in (FIRST, SECOND):
        engine.add_lora(lora_request(llama, name))
    assert engine.pin_lora(llama.adapter_id(FIRST))
    assert engine.pin_lora(llama.adapter_id(FIRST)), "it is pinned already"
    with pytest.raises(RuntimeError, match="one must stay free"):
        engine.pin_lora(llama.adapter_id(SECOND))
    assert_answers(llm, llama, *NAMES)
    assert llama.adapter_id(FIRST) in engine.list_loras()
    assert engine.remove_lora(llama.adapter_id(FIRST))
    assert engine.pin_lora(llama.adapter_id(SECOND))
    assert engine.remove_lora(llama.adapter_id(SECOND))


def test_adapters_that_are_removed_and_added_again_leave_the_others_alone(
    llm: "LLM", engine: "LLMEngine", llama: Scenario
) -> None:
    """Beside one that is another's files under another name."""
    twin = Scenario(llama.base, {**llama.adapters, "twin": llama.adapters[SECOND]}, ())
    case = case_of(llama, SECOND)
    of_twin = Case("twin", case.prompt, case.expected)
    for name in (FIRST, SECOND, "twin"):
        assert engine.add_lora(lora_request(twin, name))
    assert engine.list_loras() == {twin.adapter_id(name) for name in (FIRST, SECOND, "twin")}
    for name in (SECOND, FIRST, "twin"):
        assert_answers(llm, llama, FIRST, SECOND, FIRST)
        assert engine.remove_lora(twin.adapter_id(name))
        assert_as_peft(answer(llm, twin, [of_twin]), [of_twin])
        assert engine.add_lora(lora_request(twin, name))
    assert_answers(llm, llama, FIRST, SECOND)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_number_serves_the_folder_that_is_asked_for(
    llm: "LLM", engine: "LLMEngine", llama: Scenario, inplace: bool
) -> None:
    """Stock vLLM goes on with the weights before, unless `load_inplace` is given."""
    from vllm.lora.request import LoRARequest

    def ask(name: str, of: str, **options: bool) -> None:
        case, number = case_of(llama, of), llama.adapter_id(FIRST)
        request = LoRARequest(name, number, str(llama.adapters[of]), **options)
        assert tokens(llm, case, request) == case.expected.tokens

    ask("before", FIRST)
    ask("after", SECOND, load_inplace=inplace)
    ask("after", SECOND)


def test_one_name_may_have_two_numbers(llm: "LLM", engine: "LLMEngine", llama: Scenario) -> None:
    from vllm.lora.request import LoRARequest

    for number, of in enumerate((FIRST, SECOND), start=1):
        case = case_of(llama, of)
        request = LoRARequest("same", number, str(llama.adapters[of]))
        assert tokens(llm, case, request) == case.expected.tokens


@pytest.mark.parametrize(
    ("number", "kind"), [(np.int64(1), str), (True, str), (1, Path)], ids=["numpy", "bool", "path"]
)
def test_numbers_and_paths_may_be_of_python_s_other_kinds(
    llm: "LLM", engine: "LLMEngine", llama: Scenario, number: int, kind: "type[str | Path]"
) -> None:
    """No message to another process says that there is none of them here."""
    from vllm.lora.request import LoRARequest

    case = case_of(llama, FIRST)
    request = LoRARequest(FIRST, number, kind(llama.adapters[FIRST]))
    assert tokens(llm, case, request) == case.expected.tokens
    assert engine.add_lora(request)
    assert engine.list_loras() == {1}
    assert_answers(llm, llama, FIRST, SECOND)


def test_what_cannot_be_a_path_is_refused_before_anything_is_taken_in(
    engine: "LLMEngine",
) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(TypeError, match="PathLike"):
        engine.add_lora(LoRARequest(FIRST, 1, {"tensors": "here"}))
    assert engine.list_loras() == set()


def tokens(llm: "LLM", case: Case, request: "LoRARequest") -> tuple[int, ...]:
    (output,) = generate(llm, [case.prompt], [request])
    return tuple(output.outputs[0].token_ids)


def test_one_adapter_answers_many_prompts_and_a_list_names_each_ones(
    llm: "LLM", engine: "LLMEngine", llama: Scenario
) -> None:
    cases = llama.cases_of(FIRST)
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    settings = greedy(max_tokens=4)
    request = lora_request(llama, FIRST)
    outputs = llm.generate(prompts, settings, lora_request=request, use_tqdm=False)
    for output, case in zip(outputs, cases, strict=True):
        assert tuple(output.outputs[0].token_ids) == case.expected.tokens[:4]
    with pytest.raises(Exception, match="must be the same"):
        llm.generate(prompts, settings, lora_request=[request], use_tqdm=False)


def test_a_folder_that_is_not_there_is_reported_and_nothing_is_added(
    engine: "LLMEngine", tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(Exception, match="does not exist"):
        engine.add_lora(LoRARequest("gone", 1, str(tmp_path / "gone")))
    assert not engine.remove_lora(1)
    assert engine.list_loras() == set()
