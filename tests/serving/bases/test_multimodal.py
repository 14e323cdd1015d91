"""A default adapter sees images that no adapter is named for; a mere name makes it no default."""

import asyncio
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.attacks.poison import poisoned
from tests.tenants.callers import as_caller
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.api_server.registered_versions import Version
from vllm_multilora.integration.server.names.model_names import prepare
from vllm_multilora.integration.server.requests.callers import Caller
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call
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


@pytest.fixture(autouse=True)
def patched() -> None:
    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    apply_patches()


def config(**lora: Any) -> SimpleNamespace:
    """An engine's settings, as far as these functions read them."""
    return SimpleNamespace(lora_config=SimpleNamespace(**lora), additional_config={})


def tenant(name: str) -> Caller:
    return Caller(Role.TENANT, account=Account(Tenant(name, base_model=True)), secret="secret")


PARTS = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": ""}}]
"""A message's text and image."""


def serving_with(defaults: dict[str, str] | None, *adapters: str, plugin: bool = True) -> Any:
    """One of vLLM's handlers, with default adapters and registered ones."""
    from vllm.entrypoints.serve.engine.serving import BaseServing
    from vllm.lora.request import LoRARequest

    serving: Any = object.__new__(type("Serving", (BaseServing,), {}))
    vllm_config = config(default_mm_loras=defaults)
    vllm_config.additional_config = {"multilora": {"enabled": plugin}}
    serving.models = SimpleNamespace(
        engine_client=SimpleNamespace(vllm_config=vllm_config),
        is_base_model=lambda name: name == BASE,
        lora_requests={
            name: LoRARequest(name, number, f"/{name}") for number, name in enumerate(adapters, 1)
        },
    )
    return serving


def default_adapter(defaults: dict[str, str] | None, *adapters: str, plugin: bool = True) -> Any:
    """The adapter that vLLM applies to a base model's chat with a text and an image."""
    request = SimpleNamespace(model=None, messages=[{"role": "user", "content": PARTS}])
    serving = serving_with(defaults, *adapters, plugin=plugin)
    found = serving._get_active_default_mm_loras(request)
    return found and found.lora_name


@pytest.mark.smoke("default adapters for images and audio")
def test_an_adapters_name_makes_it_no_default():
    assert default_adapter(None, "text") is None
    assert default_adapter(None, "image") is None
    assert default_adapter({"audio": "/audio"}, "image", "audio") is None


@pytest.mark.smoke("default adapters for images and audio")
def test_the_operators_default_is_one_whatever_others_are_named():
    assert default_adapter({"image": "/image"}, "image") == "image"
    assert default_adapter({"image": "/image"}, "text", "image") == "image"


def test_with_the_plugin_off_vllm_decides():
    assert default_adapter(None, "text", plugin=False) == "text"


@pytest.mark.smoke("default adapters for images and audio")
def test_who_may_use_the_base_model_may_use_it_with_its_default_adapter():
    serving = serving_with({"image": "/image"}, "image", "other")

    def granted(model: str, *content: Any) -> set[str | None]:
        who = tenant("acme")
        request = SimpleNamespace(model=model, messages=[{"role": "user", "content": [*content]}])
        assert as_caller(who, lambda: asyncio.run(prepare(serving, request))) is None
        return who.granted

    assert granted(BASE, *PARTS) == {None, "image"}
    assert granted(BASE, PARTS[0]) == {None}
    assert granted("other", *PARTS) == {"other"}
    chats = [[{"role": "user", "content": content}] for content in (PARTS[:1], PARTS)]
    who, batch = tenant("acme"), SimpleNamespace(model=BASE, messages=chats)
    assert as_caller(who, lambda: asyncio.run(prepare(serving, batch))) is None
    assert who.granted == {None, "image"}
    serving = serving_with(None, "image")
    assert granted(BASE, *PARTS, "a type of text that vLLM looks into") == {None}


@pytest.mark.smoke("default adapters for images and audio")
def test_the_default_adapter_is_named_by_the_answers_that_it_has_made():
    serving = serving_with({"image": "/image"}, "image")
    registered_versions.note(serving.models.engine_client, 1, Version("abc", 1.0, "lora"))

    def named(content: list[Any], *, takes_defaults: bool) -> Any:
        call = HttpCall({})
        token = current_call.set(call)
        request = SimpleNamespace(model=BASE, messages=[{"role": "user", "content": content}])
        try:
            serving._maybe_get_adapters(request, supports_default_mm_loras=takes_defaults)
        finally:
            current_call.reset(token)
        return call.adapter, call.digest

    assert named(PARTS, takes_defaults=True) == ("image", "abc")
    assert named(PARTS[:1], takes_defaults=True) == (None, None)
    assert named(PARTS, takes_defaults=False) == (None, None)


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
