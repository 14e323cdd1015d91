"""Activated adapters on a server: registered, answered, refused, reloaded, quarantined, shown."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.attacks.poison import poisoned

from .. import completions, failed_answers
from ..models.activated_models import TWIN, invocation_of
from ..models.cases import NEW_TOKENS, Case, Scenario
from ..server import VllmServer

pytestmark = pytest.mark.serving

NAME, OTHER = "check", "judge"
TEXT = " ".join(f"t{token}" for token in invocation_of(NAME))
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}" + TEXT + "{% endif %}"
)


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: Scenario
    root: Path

    def load(self, name: str, folder: Path, **options: object) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(folder), **options}
        return self.server.post("/v1/load_lora_adapter", body)

    def case(self, name: str | None, *, ends_with_invocation: bool = False) -> Case:
        found = list(self.scenario.cases_of(name))
        if ends_with_invocation:
            tokens = invocation_of(NAME)
            found = [case for case in found if case.prompt[-len(tokens) :] == tokens]
        return found[-1]

    def row(self, name: str) -> dict[str, Any]:
        listing = self.server.get("/v1/lora_adapters").json()
        return next(row for row in listing["data"] if row["id"] == name)


@pytest.fixture(scope="module")
def deployment(
    activated: Scenario, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("deployed")
    with VllmServer(
        activated.base,
        *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "48"),
        *("--block-size", "32", "--chat-template", TEMPLATE),
        *("--enable-lora", "--max-loras", "2", "--max-lora-rank", "64"),
        *failed_answers.ARGUMENTS,
        *("--lora-modules", f"{NAME}={activated.adapters[NAME]}"),
        log=root / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        found = Deployment(server, activated, root)
        for name in (OTHER, TWIN):
            answer = found.load(name, activated.adapters[name])
            assert answer.status_code == 200, answer.text
        yield found


def streamed(server: VllmServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = server.post(path, {**body, "stream": True})
    if response.status_code != 200:
        return [response.json()]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_answers_over_http_are_pefts_streamed_or_not(deployment: Deployment) -> None:
    for name in (NAME, OTHER, TWIN, None):
        for case in deployment.scenario.cases_of(name)[::4]:
            completions.assert_serves(deployment.server, name or "base", case)
    case = deployment.case(NAME)
    events = streamed(deployment.server, "/v1/completions", completions.body(NAME, case))
    tokens = [token for event in events for token in event["choices"][0]["token_ids"] or ()]
    assert tuple(tokens) == case.expected.tokens


def test_a_chat_templates_generation_prompt_activates(deployment: Deployment) -> None:
    case = deployment.case(NAME, ends_with_invocation=True)
    words = [f"t{token}" for token in case.prompt[: -len(invocation_of(NAME))]]
    body = {
        "model": NAME,
        "messages": [{"role": "user", "content": " ".join(words)}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = deployment.server.post("/v1/chat/completions", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert tuple(answer["prompt_token_ids"]) == case.prompt
    assert tuple(answer["choices"][0]["token_ids"]) == case.expected.tokens


@pytest.mark.parametrize("call", failed_answers.CALLS, ids=str)
def test_every_endpoint_says_that_a_prompt_lacks_the_invocation(
    deployment: Deployment, call: failed_answers.Call
) -> None:
    tokens = invocation_of(OTHER)  # the chat template has another adapter's
    reason = (
        f"adapter '{OTHER}' is activated by the tokens {list(tokens)} "
        f"({' '.join(f't{token}' for token in tokens)!r}), which the prompt does not contain: put "
        "them where the adapter is to begin"
    )
    failed_answers.assert_fails(deployment.server, call, OTHER, HTTPStatus.BAD_REQUEST, reason)
    # The adapter is none the worse for it.
    assert deployment.row(OTHER)["last_error"] is None
    completions.assert_serves(deployment.server, OTHER, deployment.case(OTHER))


def test_listings_say_which_adapters_are_activated(deployment: Deployment) -> None:
    for name in (NAME, OTHER, TWIN):
        completions.assert_serves(deployment.server, name, deployment.case(name))
    kinds = {name: deployment.row(name)["kind"] for name in (NAME, OTHER, TWIN)}
    assert kinds == {NAME: "alora", OTHER: "alora", TWIN: "lora"}
    cards = {card["id"]: card for card in deployment.server.get("/v1/models").json()["data"]}
    assert {name: cards[name].get("kind") for name in kinds} == kinds
    assert "kind" not in cards["base"]
    assert cards[NAME]["digest"] != cards[TWIN]["digest"]  # the same weights


def test_a_new_version_is_activated_by_its_own_tokens(deployment: Deployment) -> None:
    folder = deployment.root / "reloaded"
    old, new = deployment.case(NAME), deployment.case(OTHER)
    shutil.copytree(deployment.scenario.adapters[NAME], folder)
    assert deployment.load("reloaded", folder).status_code == 200
    completions.assert_serves(deployment.server, "reloaded", old)
    shutil.copytree(deployment.scenario.adapters[OTHER], folder, dirs_exist_ok=True)
    assert deployment.load("reloaded", folder, load_inplace=True).status_code == 200
    completions.assert_serves(deployment.server, "reloaded", new)
    refused = completions.ask(deployment.server, "reloaded", old)
    assert refused.status_code == 400
    assert str(list(invocation_of(OTHER))) in refused.text
    shutil.copytree(deployment.scenario.adapters[TWIN], folder, dirs_exist_ok=True)
    assert deployment.load("reloaded", folder, load_inplace=True).status_code == 200
    completions.assert_serves(deployment.server, "reloaded", deployment.case(TWIN))


def test_one_whose_numbers_are_not_finite_is_quarantined(deployment: Deployment) -> None:
    folder = poisoned(deployment.scenario.adapters[NAME], deployment.root / "poison", "float32")
    assert deployment.load("poison", folder).status_code == 200
    case = deployment.case(NAME)
    refused = completions.ask(deployment.server, "poison", case)
    assert refused.status_code == 400, refused.text
    assert "quarantined" in refused.text
    assert deployment.row("poison")["state"] == "quarantined"
    for name in (NAME, OTHER, None):
        completions.assert_serves(deployment.server, name or "base", deployment.case(name))
