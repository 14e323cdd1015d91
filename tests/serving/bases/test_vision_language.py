"""Models that see: adapters of their language models answer about images as PEFT does."""

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from tests.attacks.poison import poisoned

from ..engine import greedy, refused_by_second_runner_of_0_29, running_engine
from ..models.recipes import (
    IDEFICS3_RECIPES,
    LANGUAGE_RECIPES,
    LLAVA_RECIPES,
    QWEN2_VL_RECIPES,
    AdapterRecipe,
)
from ..models.tiny_vision import write_idefics3, write_llava, write_llava_next, write_qwen2_vl
from ..models.vision import NEW_TOKENS, TEMPLATE, Gallery, Question, VisionReference, chat, gallery
from ..server import VllmServer
from .test_classification import text

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.serving

FIRST_NUMBER = 1 << 40
"""Number of the first adapter: numbers from adapter directories need more than 32 bits."""
GONE, POISON = "gone", "poison"
IMAGES = ((0,), (1,), (2, 1))
TOWER_RECIPES = (LANGUAGE_RECIPES[0], *QWEN2_VL_RECIPES)
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
    outputs = llm.generate(
        [question.request() for question in questions],
        greedy(max_tokens=NEW_TOKENS),
        lora_request=list(loras),
        use_tqdm=False,
    )
    return [
        (tuple(output.outputs[0].token_ids), output.outputs[0].stop_reason) for output in outputs
    ]


def with_failing(shown: Gallery, root: Path) -> tuple[list[Question], dict[str, Path]]:
    """All questions, and some to adapters that fail, in any order.

    The poisoned adapter is asked without images: a prompt with one puts nobody in quarantine, as a
    client may send numbers in an image's place.
    """
    language = shown.adapters[LANGUAGE_RECIPES[0].name]
    adapters = {
        **shown.adapters,
        GONE: root / GONE,
        POISON: poisoned(language, root / POISON, "float32"),
    }
    failing = [
        Question(name, images, question.prompt if images else question.prompt[:3], ())
        for question in shown.questions
        if question.adapter is None
        for name, images in ((GONE, question.images), (POISON, ()))
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
        else:
            assert tokens == question.answer, (question.adapter, question.images, reason)


@pytest.mark.smoke("images")
@pytest.mark.parametrize(
    ("write", "recipes", "ranks"),
    [
        pytest.param(write_llava, LANGUAGE_RECIPES, 2, id="llava-tp2"),
        pytest.param(write_llava_next, LANGUAGE_RECIPES, 1, id="llava-next"),
        pytest.param(write_qwen2_vl, LANGUAGE_RECIPES, 1, id="qwen2-vl"),
        pytest.param(write_idefics3, IDEFICS3_RECIPES, 1, id="idefics3"),
    ],
)
def test_questions_about_images_are_answered_as_by_peft_beside_failing_adapters(
    tmp_path: Path, write: Callable[[Path], Path], recipes: Sequence[AdapterRecipe], ranks: int
) -> None:
    shown = gallery(tmp_path, write, recipes, IMAGES)
    questions, adapters = with_failing(shown, tmp_path)
    with running_engine(
        shown.base,
        in_process=ranks == 1,
        tensor_parallel_size=ranks,
        skip_tokenizer_init=False,
        max_loras=2,
        max_cpu_loras=3,
    ) as llm:
        for _ in range(2):  # then from what is cached of the images
            assert_as_peft(questions, ask(llm, questions, adapters))


def test_a_server_with_tower_adapters_is_left_to_stock_vllm(tmp_path: Path) -> None:
    shown = gallery(tmp_path, write_qwen2_vl, TOWER_RECIPES, [(1,)])
    with VllmServer(
        shown.base,
        *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "128", "--max-num-seqs", "4", "--block-size", "32"),
        *("--enable-lora", "--enable-tower-connector-lora", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in shown.adapters.items())),
        *("--multilora-adapter-dir", str(tmp_path), "--chat-template", TEMPLATE),
        log=tmp_path / "vllm.log",
    ) as server:
        assert server.get("/v1/lora_adapters").status_code == 404
        served = {model["id"] for model in server.get("/v1/models").json()["data"]}
        answers = [
            (
                question,
                server.post(
                    "/v1/chat/completions",
                    {
                        "model": question.adapter or "base",
                        "messages": chat(question),
                        "temperature": 0,
                        "max_tokens": NEW_TOKENS,
                        "ignore_eos": True,
                    },
                ),
            )
            for question in shown.questions
        ]
        log = server.log.read_text()
    assert served == {"base", *shown.adapters}  # and no folder of the directory
    for question, answer in answers:
        assert answer.is_success, answer.text
        words = answer.json()["choices"][0]["message"]["content"]
        assert words.split() == text(question.answer).split(), question
        assert not any("multilora" in name for name in answer.headers)
    (line,) = {each.partition("] ")[2] for each in log.splitlines() if "leaves this server" in each}
    assert "--enable-tower-connector-lora" in line
    assert line.endswith("no effect: --multilora-adapter-dir.")


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ({"tenants": "/etc/tenants.yaml"}, "--enable-lora without --enable-tower-connector-lora"),
        ({"signing_keys": "/etc/keys.pem"}, "leave out .* and --enable-tower-connector-lora"),
    ],
    ids=["tenants", "signatures"],
)
def test_a_server_with_tower_adapters_and_checks_does_not_start(
    tmp_path: Path, setting: dict[str, str], hint: str
) -> None:
    """Stock vLLM would check neither keys nor signatures."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    apply_patches()
    arguments = EngineArgs(
        str(write_qwen2_vl(tmp_path / "base")),
        enable_lora=True,
        enable_tower_connector_lora=True,
        additional_config={"multilora": setting},
    )
    with pytest.raises(ConfigError, match=f"(?i){hint}"):
        arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def test_without_adapters_of_towers_language_is_all_that_adapters_change(tmp_path: Path) -> None:
    """As with vLLM: adapters of other parts are refused, and a mixed one's language part acts."""
    from vllm_multilora.integration.failed_requests import AdapterRefusedError

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


@refused_by_second_runner_of_0_29
@pytest.mark.smoke
def test_fast_prefill_with_adapters_is_refused_at_start(tmp_path: Path) -> None:
    """Its last layers compute the last token of each prompt only, by whichever adapter."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    apply_patches()
    base = str(write_qwen2_vl(tmp_path / "base"))
    with pytest.raises(ConfigError, match=r"^--kv-sharing-fast-prefill does not go together"):
        EngineArgs(base, enable_lora=True, kv_sharing_fast_prefill=True).create_engine_config()
    EngineArgs(base, enable_lora=True).create_engine_config()


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("option", "named"),
    [({"enable_dbo": True}, "--enable-dbo"), ({"ubatch_size": 2}, "--ubatch-size"), ({}, None)],
)
def test_a_step_in_several_parts_is_refused(option: dict[str, Any], named: str | None) -> None:
    """Only these settings of vLLM are looked at; its CPU build turns such options off."""
    from vllm.config import CacheConfig, ParallelConfig

    from vllm_multilora.errors import ConfigError
    from vllm_multilora.integration.api_server.engine_settings import require_rows_in_order

    config: Any = SimpleNamespace(
        cache_config=CacheConfig(),
        parallel_config=ParallelConfig(**option),
    )
    refused = pytest.raises(ConfigError, match=f"^{named} does not go together with --enable-lora")
    with nullcontext() if named is None else refused:
        require_rows_in_order(config)
