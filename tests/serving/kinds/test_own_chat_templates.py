"""Chats with the template that their adapter brings, over HTTP, and no others' chats."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ..models.cases import Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import ServerStartError, VllmServer

pytestmark = pytest.mark.serving

NAME, OTHER, PLAIN = (recipe.name for recipe in LINEAR_RECIPES[:3])
BASE = "{% for m in messages %}{{ m.content }} {% endfor %}t1"
OWN = "{% for m in messages %}t5 {{ m.content }} t6 {% endfor %}t7"
NEWER = "{% for m in messages %}t8 {{ m.content }} {% endfor %}t9"
CHAT = [{"role": "user", "content": "t20 t21"}, {"role": "assistant", "content": "t22"}]
FLAG = "--multilora-adapter-chat-templates"
LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def copied(source: Path, to: Path, template: str | None = None, **config: Any) -> Path:
    """An adapter's folder with a template of its own, and the rest of a tokenizer's settings."""
    shutil.copytree(source, to)
    if template is not None:
        (to / "chat_template.jinja").write_text(template)
    if config:
        (to / "tokenizer_config.json").write_text(json.dumps(config))
    return to


@pytest.fixture(scope="module")
def base(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with a template of its own."""
    folder = tmp_path_factory.mktemp("templates") / "base"
    shutil.copytree(llama.base, folder)
    (folder / "chat_template.jinja").write_text(BASE)
    return folder


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "own.jinja").write_text(f"{OWN}\n")
    (folder / "newer.jinja").write_text(NEWER)
    return folder


@pytest.fixture(scope="module")
def server(base: Path, allowed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", FLAG, str(allowed))
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    named = ("--served-model-name", "base")
    with VllmServer(base, *flags, *named, log=log, env=env) as running:
        yield running


def load(server: VllmServer, name: str, path: Path, **options: Any) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **options}
    return server.post("/v1/load_lora_adapter", json=body)


def prompt(server: VllmServer, model: str, **fields: Any) -> str:
    """What the server makes of a chat."""
    body = {"model": model, "messages": CHAT, "add_generation_prompt": True, **fields}
    answer = server.post("/tokenize", json=body)
    assert answer.status_code == 200, f"{answer.text}\n{server.log_tail()}"
    return " ".join(f"t{token}" for token in answer.json()["tokens"])


def answered(server: VllmServer, path: str, **body: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = server.post(path, json={**sampling, **body})
    assert answer.status_code == 200, f"{answer.text}\n{server.log_tail()}"
    return dict(answer.json())


def test_an_adapters_template_renders_its_chats_and_no_others(server, llama, tmp_path):
    own = copied(llama.adapters[NAME], tmp_path / "own", OWN)
    configured = copied(llama.adapters[OTHER], tmp_path / "configured", chat_template=NEWER)
    plain = copied(llama.adapters[PLAIN], tmp_path / "plain")
    same = copied(llama.adapters[PLAIN], tmp_path / "same", BASE)
    for name, path in (("own", own), ("conf", configured), ("plain", plain), ("same", same)):
        assert load(server, name, path).status_code == 200, server.log_tail()
    assert prompt(server, "own") == "t5 t20 t21 t6 t5 t22 t6 t7"
    assert prompt(server, "conf") == "t8 t20 t21 t8 t22 t9"
    for name in ("base", "plain", "same"):
        assert prompt(server, name) == "t20 t21 t22 t1"
    chat = answered(server, "/v1/chat/completions", model="own", messages=CHAT)
    assert chat["prompt_token_ids"] == [5, 20, 21, 6, 5, 22, 6, 7]
    text = answered(server, "/v1/completions", model="own", prompt=chat["prompt_token_ids"])
    assert chat["choices"][0]["token_ids"] == text["choices"][0]["token_ids"]
    for path, asked in (
        ("/v1/messages", {"messages": CHAT[:1], "max_tokens": 4}),
        ("/v1/responses", {"input": "t20"}),
    ):
        refused = server.post(path, json={"model": "own", **asked})
        assert refused.status_code == 400
        assert "expected /v1/chat/completions" in refused.text
        assert server.post(path, json={"model": "plain", **asked}).status_code == 200


def test_a_new_version_brings_its_template_and_an_unload_takes_it_away(server, llama, tmp_path):
    path = copied(llama.adapters[NAME], tmp_path / "swapped", OWN)
    assert load(server, "swapped", path).status_code == 200
    assert prompt(server, "swapped").startswith("t5 ")
    (path / "chat_template.jinja").write_text(NEWER)
    assert load(server, "swapped", path, load_inplace=True).status_code == 200
    assert prompt(server, "swapped").startswith("t8 ")
    server.post("/v1/unload_lora_adapter", json={"lora_name": "swapped"})
    (path / "chat_template.jinja").unlink()
    assert load(server, "swapped", path).status_code == 200
    assert prompt(server, "swapped") == "t20 t21 t22 t1"


@pytest.mark.parametrize(
    ("template", "config", "said"),
    [
        pytest.param(LONG, {}, "is not in the folder", id="that-nobody-allowed"),
        pytest.param("x" * (257 << 10), {}, "is too long", id="too-long"),
        pytest.param(
            OWN,
            {"added_tokens_decoder": {"900": {"content": "<|new|>"}}},
            "adds the token '<|new|>', expected the base model's alone",
            id="added-token",
        ),
    ],
)
def test_a_template_that_cannot_be_used_has_its_adapter_refused(
    server, llama, tmp_path, template, config, said
):
    path = copied(llama.adapters[NAME], tmp_path / "wrong", template, **config)
    answer = load(server, "wrong", path)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
    assert str(tmp_path) not in answer.text
    assert prompt(server, "base") == "t20 t21 t22 t1"


@pytest.mark.parametrize(
    "fields",
    [{"chat_template": OWN}, {"chat_template_kwargs": {"chat_template": OWN}}],
    ids=["field", "keyword"],
)
def test_templates_of_clients_are_still_refused(server, fields):
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = server.post(path, json={"model": "base", "messages": CHAT, **fields})
        assert answer.status_code == 400
        assert "--trust-request-chat-template" in answer.text
    assert prompt(server, "base", chat_template=None) == "t20 t21 t22 t1"


def test_a_server_with_a_broken_template_does_not_start(base, tmp_path):
    (tmp_path / "broken.jinja").write_text("{% for %}")
    flags = ("--enable-lora", FLAG, str(tmp_path))
    with (
        pytest.raises(ServerStartError, match="each of which renders a short chat"),
        VllmServer(base, *flags, log=tmp_path / "log"),
    ):
        pass
