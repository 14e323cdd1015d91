"""Models that see: adapters of all their parts answer questions about images as PEFT does."""

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.attacks.poison import poisoned
from vllm_multilora.adapters.validation import validate

from .engine import running_engine
from .recipes import (
    IDEFICS3_RECIPES,
    LANGUAGE_RECIPES,
    LLAVA_RECIPES,
    QWEN2_VL_RECIPES,
    AdapterRecipe,
)
from .tiny_adapters import write_adapter, write_adapters
from .tiny_vision import write_idefics3, write_llava, write_llava_next, write_qwen2_vl
from .vision import NEW_TOKENS, Gallery, Question, VisionReference, gallery

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

FIRST_NUMBER = 1 << 40
"""Of an adapter: those that adapter directories give need more than 32 bits."""
GONE, POISON, POISONED_TOWER = "gone", "poison", "poisoned-tower"
IMAGES = ((0,), (1,), (2, 1))
MIXED = ("tower-r16", "connector-r8")
"""Of other parts than language: as many as there are slots."""
LANGUAGE_NAMES = tuple(recipe.name for recipe in LANGUAGE_RECIPES)


def lora(adapters: Mapping[str, Path], name: str | None) -> "LoRARequest | None":
    from vllm.lora.request import LoRARequest

    if name is None:
        return None
    return LoRARequest(name, FIRST_NUMBER + list(adapters).index(name), str(adapters[name]))


def ask(
    llm: "LLM", questions: Sequence[Question], adapters: Mapping[str, Path]
) -> list[tuple[tuple[int, ...], str]]:
    """The answers to questions that are asked at once: tokens, and why they ended."""
    return generate(llm, questions, [lora(adapters, question.adapter) for question in questions])


def generate(
    llm: "LLM", questions: Sequence[Question], loras: "Sequence[LoRARequest | None]"
) -> list[tuple[tuple[int, ...], str]]:
    """The same, of adapters that are given here."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [question.request() for question in questions],
        SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False),
        lora_request=list(loras),
        use_tqdm=False,
    )
    return [
        (tuple(output.outputs[0].token_ids), output.outputs[0].stop_reason) for output in outputs
    ]


def with_failing(shown: Gallery, root: Path, tower: str) -> tuple[list[Question], dict[str, Path]]:
    """All questions, and some to adapters that fail, in any order.

    One makes NaN of the images that it sees: that is looked at in prompts without images only, as a
    client may send what stands for an image. Its own answers are all that it spoils.
    """
    language = shown.adapters[LANGUAGE_RECIPES[0].name]
    adapters = {
        **shown.adapters,
        GONE: root / GONE,
        POISON: poisoned(language, root / POISON, "float32"),
        POISONED_TOWER: poisoned(
            shown.adapters["tower-r16"], root / POISONED_TOWER, "float32", part=tower
        ),
    }
    failing = [
        Question(name, images, question.prompt if images else question.prompt[:3], ())
        for question in shown.questions
        if question.adapter is None
        for name, images in (
            (GONE, question.images),
            (POISON, ()),
            (POISONED_TOWER, question.images),
        )
    ]
    questions = [*shown.questions, *failing]
    random.Random(1).shuffle(questions)
    return questions, adapters


def assert_as_peft(
    questions: Sequence[Question], answers: Sequence[tuple[tuple[int, ...], str]]
) -> None:
    for question, (tokens, reason) in zip(questions, answers, strict=True):
        if question.adapter == GONE:
            assert GONE in reason
        elif question.adapter == POISON:
            assert "quarantined" in reason
        elif question.adapter != POISONED_TOWER:
            assert tokens == question.answer, (question.adapter, question.images, reason)


@pytest.mark.smoke("images", "adapters of towers and connectors")
@pytest.mark.parametrize(
    ("write", "recipes", "tower", "ranks"),
    [
        pytest.param(write_llava, LLAVA_RECIPES, "v_proj", 1, id="llava"),
        pytest.param(write_llava, LLAVA_RECIPES, "v_proj", 2, id="llava-tp2"),
        pytest.param(write_llava_next, LLAVA_RECIPES, "v_proj", 1, id="llava-next"),
        pytest.param(write_qwen2_vl, QWEN2_VL_RECIPES, "qkv", 1, id="qwen2-vl"),
        pytest.param(write_idefics3, IDEFICS3_RECIPES, "v_proj", 1, id="idefics3"),
    ],
)
def test_adapters_of_all_parts_answer_as_peft_beside_some_that_fail(
    tmp_path: Path,
    write: Callable[[Path], Path],
    recipes: Sequence[AdapterRecipe],
    tower: str,
    ranks: int,
) -> None:
    shown = gallery(tmp_path, write, recipes, IMAGES)
    questions, adapters = with_failing(shown, tmp_path, tower)
    with running_engine(
        shown.base,
        in_process=ranks == 1,
        tensor_parallel_size=ranks,
        skip_tokenizer_init=False,
        max_loras=2,
        max_cpu_loras=3,
        enable_tower_connector_lora=True,
    ) as llm:
        # Once in their slots, all of these have the same steps, and the same groups of images.
        ask(llm, [Question(name, (), (1,), ()) for name in MIXED], adapters)
        mixed = [question for question in questions if question.adapter in (None, *MIXED)]
        assert_as_peft(mixed, ask(llm, mixed, adapters))
        for _ in range(2):  # then from what is cached of the images
            assert_as_peft(questions, ask(llm, questions, adapters))


@pytest.mark.smoke("adapters of towers and connectors")
def test_images_are_encoded_by_each_versions_own_tower_group_by_group(tmp_path: Path) -> None:
    """Between two images comes what needs no tower, which has vLLM begin again with its rows."""
    recipes = (QWEN2_VL_RECIPES[0], QWEN2_VL_RECIPES[2])
    shown = gallery(tmp_path, write_qwen2_vl, recipes, [(0,), (1,)])
    base, language, tower = shown.questions[3:]
    reloaded = AdapterRecipe("reloaded", recipes[1].targets, rank=8, within=recipes[1].within)
    other = write_adapter(
        shown.base, tmp_path / "other", reloaded, seed=9, auto=AutoModelForImageTextToText
    )
    truth, _ = VisionReference(shown.base, {"other": other}).answer("other", (1,), tower.prompt)
    assert truth != tower.answer
    with running_engine(
        shown.base,
        in_process=True,
        skip_tokenizer_init=False,
        max_loras=2,
        enable_tower_connector_lora=True,
        enable_mm_embeds=True,
    ) as llm:
        ask(llm, shown.questions[:3], shown.adapters)  # in their slots, all have the same steps
        embedded = Embedded(None, (1,), base.prompt, ())
        batch = [language, base, embedded, tower]
        for question, (tokens, _) in zip(batch, ask(llm, batch, shown.adapters), strict=True):
            assert question is embedded or tokens == question.answer, question
        folder = shown.adapters[recipes[1].name]
        shutil.rmtree(folder)
        other.rename(folder)
        again = {**{str(n): folder for n in range(5)}, **shown.adapters}  # another number
        assert ask(llm, [tower], again)[0][0] == truth


@dataclass(frozen=True)
class Embedded(Question):
    """A question about an image that somebody has encoded already."""

    def request(self) -> dict[str, Any]:
        import torch

        grid = torch.tensor([[1, 4, 6]])
        image = {"image_embeds": torch.zeros(6, 128), "image_grid_thw": grid}
        return {"prompt_token_ids": list(self.prompt), "multi_modal_data": {"image": image}}


def test_without_adapters_of_towers_language_is_all_that_adapters_change(tmp_path: Path) -> None:
    """As with vLLM: adapters of other parts are refused, and a mixed one's language part acts."""
    from vllm_multilora.integration.failures import AdapterRefusedError

    shown = gallery(tmp_path, write_llava, LLAVA_RECIPES, [(1,)])
    mixed = shown.adapters["both-r12"]
    language = shutil.copytree(mixed, tmp_path / "language")
    tensors = load_file(mixed / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "language_model" in name}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, language / "adapter_model.safetensors")
    reference = VisionReference(shown.base, {"language": language})
    questions = [q for q in shown.questions if q.adapter in (None, *LANGUAGE_NAMES)]
    both = next(q for q in shown.questions if q.adapter == "both-r12")
    answer, _ = reference.answer("language", both.images, both.prompt)
    questions.append(Question("both-r12", both.images, both.prompt, answer))
    with running_engine(shown.base, in_process=True, skip_tokenizer_init=False, max_loras=2) as llm:
        assert_as_peft(questions, ask(llm, questions, shown.adapters))
        for name in ("tower-r16", "connector-r8"):
            with pytest.raises(AdapterRefusedError, match="applies no adapters to these modules"):
                llm.llm_engine.add_lora(lora(shown.adapters, name))


def test_adapters_of_towers_that_vllm_cannot_adapt_are_refused_where_these_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral 3 and Hugging Face's InternVL are such models: vLLM ignores the flag for them."""
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from vllm_multilora.integration.failures import AdapterRefusedError

    monkeypatch.setattr(LlavaForConditionalGeneration, "supports_tower_connector_lora", False)
    shown = gallery(tmp_path, write_llava, LLAVA_RECIPES, [(1,)])
    questions = [q for q in shown.questions if q.adapter in (None, *LANGUAGE_NAMES)]
    with running_engine(
        shown.base,
        in_process=True,
        skip_tokenizer_init=False,
        max_loras=2,
        enable_tower_connector_lora=True,
    ) as llm:
        assert_as_peft(questions, ask(llm, questions, shown.adapters))
        for name in ("both-r12", "tower-r16", "connector-r8"):
            with pytest.raises(AdapterRefusedError, match="of this part of LlavaForConditionalGen"):
                llm.llm_engine.add_lora(lora(shown.adapters, name))


def test_validate_says_of_adapters_of_towers_what_a_server_with_its_flags_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    from vllm_multilora.integration.offline.model import Server, offline_layout

    base = write_llava(tmp_path / "base")
    adapters = write_adapters(base, tmp_path, LLAVA_RECIPES, auto=AutoModelForImageTextToText)

    def refused(*, flag: bool) -> set[str]:
        server = Server(str(base), max_lora_rank=64, enable_tower_connector_lora=flag)
        layout = offline_layout(server)
        return {name for name, path in adapters.items() if validate(path, layout)}

    of_towers = {"tower-r16", "connector-r8"}
    assert refused(flag=False) == of_towers
    assert refused(flag=True) == set()
    monkeypatch.setattr(LlavaForConditionalGeneration, "supports_tower_connector_lora", False)
    assert refused(flag=True) == {*of_towers, "both-r12"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
    ],
)
def test_what_would_have_adapters_meet_others_rows_is_refused(
    tmp_path: Path, option: dict[str, Any], named: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.patching.ledger import apply_patches

    apply_patches()
    base = str(write_qwen2_vl(tmp_path / "base"))
    towers: dict[str, Any] = {"enable_tower_connector_lora": True}
    with pytest.raises(ConfigError, match=f"^{named} does not go together with"):
        EngineArgs(base, enable_lora=True, **towers, **option).create_engine_config()
    EngineArgs(base, enable_lora=True, **towers).create_engine_config()
    if "kv_sharing_fast_prefill" not in option:
        EngineArgs(base, enable_lora=True, **option).create_engine_config()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("option", "named"),
    [({"enable_dbo": True}, "--enable-dbo"), ({"ubatch_size": 2}, "--ubatch-size"), ({}, None)],
)
def test_a_step_in_several_parts_is_refused(option: dict[str, Any], named: str | None) -> None:
    """Of vLLM's configuration this is what is looked at; its CPU build turns such options off."""
    from vllm.config import CacheConfig, ParallelConfig

    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.api_server.row_order import require_rows_in_order

    config: Any = SimpleNamespace(
        lora_config=SimpleNamespace(enable_tower_connector_lora=False),
        model_config=None,
        cache_config=CacheConfig(),
        parallel_config=ParallelConfig(**option),
    )
    refused = pytest.raises(ConfigError, match=f"^{named} does not go together with --enable-lora")
    with nullcontext() if named is None else refused:
        require_rows_in_order(config)
