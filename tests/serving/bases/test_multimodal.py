"""A default adapter sees images that no adapter is named for; a mere name makes it no default."""

import asyncio
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.attacks.poison import poisoned
from tests.tenants.callers import as_caller
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.registered_versions import Version
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.names.model_names import Chosen, choose
from vllm_multilora.integration.server.names.public_names import PART_KINDS, public_names, separate
from vllm_multilora.integration.server.requests.callers import Caller
from vllm_multilora.integration.server.requests.http_calls import HttpCall
from vllm_multilora.integration.server.requests.metering import METER, ServerMeter
from vllm_multilora.tenants.limits import Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant

from ..engine import running_engine
from ..models.recipes import LANGUAGE_RECIPES, AdapterRecipe
from ..models.tiny_vision import write_llava
from ..models.vision import NEW_TOKENS, TEMPLATE, Gallery, Question, chat, gallery
from ..server import VllmServer
from ..slots.test_prefix_keys import changed_by_a_byte
from .test_classification import text
from .test_vision_language import ask, assert_as_peft, generate

pytestmark = pytest.mark.serving  # imports vLLM

BASE, GONE, POISON = "base", "gone", "poison"
LANGUAGE, DEFAULT = (recipe.name for recipe in LANGUAGE_RECIPES)
"""Adapters; the second is the operator's default for images."""
OTHER = "other"
"""Pushes others out of host memory."""


def tenant(name: str) -> Caller:
    return Caller(Role.TENANT, account=Account(Tenant(name, base_model=True)), secret="secret")


PARTS = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": ""}}]
"""A message's text and image."""


def models_with(defaults: dict[str, str] | None, *adapters: str) -> Any:
    """vLLM's table of models behind the gateway, with default adapters and registered ones."""
    from vllm.lora.request import LoRARequest

    METER.set(processor := SimpleNamespace(), ServerMeter(None))
    lora_config = SimpleNamespace(default_mm_loras=defaults)
    vllm_config = SimpleNamespace(lora_config=lora_config, additional_config={})
    models = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=vllm_config, output_processor=processor),
        base_model_paths=[SimpleNamespace(name=BASE)],
        is_base_model=lambda name: name == BASE,
        lora_requests={
            name: LoRARequest(name, number, f"/{name}") for number, name in enumerate(adapters, 1)
        },
    )
    separate(models)
    return models


def chat_of(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content]}]


@pytest.mark.smoke("default adapters for images and audio")
def test_vllm_finds_the_operators_default_adapters_alone() -> None:
    """It applies all that it finds by the kinds of a message's parts."""
    from vllm.entrypoints.serve.engine.serving import BaseServing

    def default_adapter(models: Any) -> str | None:
        serving: Any = object.__new__(type("Serving", (BaseServing,), {}))
        serving.models = models
        request = SimpleNamespace(model=None, messages=chat_of(*PARTS))
        found = serving._maybe_get_adapters(request, supports_default_mm_loras=True)
        return None if found is None else str(found.lora_name)

    assert default_adapter(models_with(None, "other")) is None
    models = models_with({"image": "/image"}, "image", "other")
    assert default_adapter(models) == "image"
    assert set(models.lora_requests) == {"image"}
    assert set(public_names(models)) == {"image", "other"}
    reloaded = public_names(models)["other"]
    public_names(models)["image"] = reloaded
    assert models.lora_requests == {"image": reloaded}
    del public_names(models)["image"]
    assert default_adapter(models) is None


@pytest.mark.smoke("default adapters for images and audio")
def test_adapter_with_the_name_of_a_message_part_is_refused_unless_it_is_a_default() -> None:
    for name in ("text", "image"):
        found = registration.name_refusal(models_with(None), name)
        assert found is not None
        assert found.error.code == 400
        assert f"named '{name}' to all chats" in found.error.message
    with pytest.raises(ConfigError, match=r"--lora-modules: vLLM applies .* 'text'"):
        models_with({"image": "/image"}, "image", "text")


@pytest.mark.smoke("default adapters for images and audio")
def test_kinds_of_message_parts_are_all_of_vllms() -> None:
    import vllm

    parsers = re.compile(r"^MM_PARSER_MAP.*?^}$", re.MULTILINE | re.DOTALL)
    files = Path(vllm.__file__).parent.rglob("chat_*.py")
    [found] = [text[0] for file in files if (text := parsers.search(file.read_text()))]
    kinds = {name.split("_")[0] for name in re.findall(r'^    "(\w+)":', found, re.MULTILINE)}
    assert kinds
    assert kinds <= PART_KINDS


@pytest.mark.smoke("default adapters for images and audio")
def test_who_may_use_the_base_model_may_use_it_with_its_default_adapter() -> None:
    models = models_with({"image": "/image"}, "image", "other")

    def granted(model: str, messages: list[Any]) -> set[str | None]:
        who, call = tenant("acme"), HttpCall({}, path="/v1/chat/completions")
        chosen = as_caller(
            who, lambda: asyncio.run(choose(call, models, model, {"messages": messages}))
        )
        assert isinstance(chosen, Chosen)
        return who.granted

    assert granted(BASE, chat_of(*PARTS)) == {None, "image"}
    assert granted(BASE, chat_of(PARTS[0])) == {None}
    assert granted(BASE, [chat_of(PARTS[0]), chat_of(*PARTS)]) == {None, "image"}
    models = models_with(None, "other")
    assert granted(BASE, chat_of(*PARTS, "a type of text that vLLM looks into")) == {None}


@pytest.mark.smoke("default adapters for images and audio")
@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/chat/completions", ("image", "abc")),
        ("/v1/messages", ("image", "abc")),
        ("/tokenize", (None, None)),
        ("/v1/embeddings", (None, None)),
    ],
)
def test_default_adapter_answers_chats_and_is_named_by_their_answers(path: str, named: Any) -> None:
    models = models_with({"image": "/image"}, "image")
    registered_versions.note(models.engine_client, 1, Version("abc", 1.0, "lora"))

    def answered_by(content: list[Any]) -> Any:
        call = HttpCall({}, path=path)
        chosen = asyncio.run(choose(call, models, BASE, {"messages": chat_of(*content)}))
        assert isinstance(chosen, Chosen)
        assert (None if chosen.lora is None else chosen.lora.lora_name) == call.adapter
        return call.adapter, call.digest

    assert answered_by(PARTS) == named
    assert answered_by(PARTS[:1]) == (None, None)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Questions with an image, and without."""
    other = AdapterRecipe(OTHER, ("k_proj", "o_proj"), within="language_model")
    recipes = (*LANGUAGE_RECIPES, other)
    return gallery(tmp_path_factory.mktemp("shown"), write_llava, recipes, [(1,), ()])


def of_base(question: Question) -> Question:
    """The same, asked of the base model."""
    return Question(None, question.images, question.prompt, question.answer)


def by_default(shown: Gallery) -> list[Question]:
    """What nobody names an adapter for: an image is seen by the default, a text by none."""
    return [
        of_base(question)
        for question in shown.questions
        if question.adapter == (DEFAULT if question.images else None)
    ]


def failing(shown: Gallery, root: Path) -> dict[str, Path]:
    """By name, adapters that overflow in use, and that are to lose their files."""
    source = shown.adapters[LANGUAGE]
    return {
        POISON: poisoned(source, root / POISON, "float32"),
        GONE: changed_by_a_byte(source, root / GONE),  # else it would share memory with the other
    }


def failures(shown: Gallery) -> list[Question]:
    image, words = by_default(shown)
    return [
        Question(POISON, (), words.prompt[:3], ()),
        Question(GONE, image.images, image.prompt, ()),
    ]


def named(shown: Gallery) -> list[Question]:
    return [question for question in shown.questions if question.adapter is not None]


@pytest.mark.smoke("default adapters for images and audio")
def test_images_that_name_no_adapter_are_answered_as_by_pefts_default(
    shown: Gallery, tmp_path: Path
) -> None:
    """Beside adapters that fail. vLLM gives the default the number 1."""
    from vllm.lora.request import LoRARequest

    adapters = {**shown.adapters, **failing(shown, tmp_path)}
    shutil.rmtree(adapters[GONE])
    questions = [*failures(shown), *by_default(shown), *named(shown)]
    image = by_default(shown)[0]
    other = next(question for question in named(shown) if question.adapter == LANGUAGE)
    same_number = LoRARequest(LANGUAGE, 1, str(shown.adapters[LANGUAGE]))
    with running_engine(
        shown.base,
        in_process=True,
        skip_tokenizer_init=False,
        max_loras=2,
        max_cpu_loras=2,
        default_mm_loras={"image": str(shown.adapters[DEFAULT])},
    ) as llm:
        assert_as_peft(questions, ask(llm, questions, adapters))
        by_one = generate(llm, [image, other], [None, same_number])
        alone = generate(llm, [other], [same_number])
    assert by_one[0][0] == image.answer
    assert "number 1 is that of adapter 'image'" in by_one[1][1]
    assert alone[0][0] == other.answer


@pytest.mark.smoke("default adapters for images and audio")
def test_chats_with_images_are_answered_as_by_pefts_default(shown: Gallery, tmp_path: Path) -> None:
    """Beside adapters that fail, with fewer slots and less host memory than all of them need."""
    adapters = {**shown.adapters, **failing(shown, tmp_path)}
    with VllmServer(
        shown.base,
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "128", "--max-num-seqs", "16", "--block-size", "32"),
        *("--chat-template", TEMPLATE, "--enable-lora"),
        *("--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        *("--default-mm-loras", json.dumps({"image": str(shown.adapters[DEFAULT])})),
        log=tmp_path / "vllm.log",
    ) as server:

        def answer(question: Question) -> httpx.Response:
            body = {"model": question.adapter or BASE, "messages": chat(question)}
            more = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
            return server.post("/v1/chat/completions", {**body, **more})

        for name in (LANGUAGE, OTHER):  # they push the others out of host memory
            assert answer(Question(name, (), (1,), ())).is_success, server.log_tail()
        shutil.rmtree(adapters[GONE])
        asked = [*by_default(shown), *named(shown)] * 2
        with ThreadPoolExecutor(16) as pool:
            failed = list(pool.map(answer, failures(shown)))
            answers = list(pool.map(answer, asked))
    assert [response.status_code for response in failed] == [400, 404]
    for question, response in zip(asked, answers, strict=True):
        assert response.is_success, f"{response.text}\n{server.log_tail()}"
        words = response.json()["choices"][0]["message"]["content"]
        assert words.split() == text(question.answer).split(), question
        answered_by = question.adapter or ("image" if question.images else None)
        assert response.headers.get("x-multilora-adapter") == answered_by
        assert response.json().get("multilora", {}).get("adapter") == answered_by
