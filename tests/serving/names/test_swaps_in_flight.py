"""Adapters that are loaded over HTTP while running answers go on with them."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from .. import completions
from ..models.cases import Case, Scenario
from ..models.peft_reference import PeftReference
from ..server import VllmServer
from .test_registration import BASE, NAMES, Deployment, with_long_context

pytestmark = pytest.mark.serving

SWAP = {"load_inplace": True, "swap": "in_flight"}
MAX_TOKENS = 300
FIRST, SECOND = NAMES[:2]


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("allowed")
    with VllmServer(
        with_long_context(llama.base, tmp_path_factory.mktemp("long") / "base"),
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--block-size", "32", "--max-model-len", "512", "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-lora-rank", "64"),
        *("--multilora-allowed-roots", str(root)),
        log=tmp_path_factory.mktemp("swaps") / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, llama, root)


def version_of(deployment: Deployment, name: str) -> str:
    cards = deployment.server.get("/v1/models").json()["data"]
    return str(next(card["digest"] for card in cards if card["id"] == name))


def streamed(deployment: Deployment, case: Case, has_begun: threading.Event) -> dict[str, Any]:
    """The choice of a stream, as one object; the tokens of all its events together."""
    body = completions.body("acme", case, max_tokens=MAX_TOKENS, stream=True)
    url, tokens, prompt = f"{deployment.server.url}/v1/completions", list[int](), None
    with (
        httpx.Client(trust_env=False, timeout=120) as client,
        client.stream("POST", url, json=body) as response,
    ):
        for line in filter(None, response.iter_lines()):
            if line == "data: [DONE]":
                break
            event = json.loads(line.removeprefix("data: "))
            (choice,) = event["choices"]
            tokens += choice["token_ids"] or []
            prompt = prompt or choice.get("prompt_token_ids")
            if len(tokens) > 5:
                has_begun.set()
    return {**choice, "token_ids": tokens}


def assert_by_spans(
    deployment: Deployment, prompt: tuple[int, ...], choice: dict[str, Any], names: dict[str, str]
) -> list[str]:
    """Each token is PEFT's, by the version that the spans name; returns the versions in turn."""
    peft = PeftReference(
        deployment.scenario.base,
        {name: deployment.scenario.adapters[name] for name in names.values()},
    )
    versions, found = list[str](), list[str]()
    for key, begin, end in (
        ("prompt_policy_token_spans", 1, len(prompt)),
        ("policy_token_spans", 0, len(choice["token_ids"])),
    ):
        for span in choice[key]:
            assert span.keys() == {
                *("start_token", "end_token", "generation_id"),
                *("policy_version", "lora_slot", "update_seq"),
            }
            assert span["start_token"] == begin
            begin = span["end_token"]
            found.append(names[span["generation_id"]])
            versions += [found[-1]] * (begin - span["start_token"])
        assert begin == end
    tokens = (*prompt, *choice["token_ids"])[:-1]
    chosen = peft.likeliest_in_turn(tokens, versions)
    assert chosen[len(prompt) - 1 :] == choice["token_ids"]
    return found


def test_running_answers_go_on_with_what_is_loaded(deployment: Deployment) -> None:
    case, has_begun = deployment.case(FIRST), threading.Event()
    assert deployment.load("acme", deployment.put(FIRST, "one"), **SWAP).status_code == 200
    first = version_of(deployment, "acme")
    two = deployment.put(SECOND, "two")
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(streamed, deployment, case, has_begun)
        two_prompts = {"prompt": [list(case.prompt)] * 2, "max_tokens": MAX_TOKENS}
        whole = threads.submit(deployment.ask, "acme", case, **two_prompts)
        assert has_begun.wait(60)
        response = deployment.load("acme", two, **SWAP, expected_version=first[:16])
        assert response.status_code == 200, response.text
    second = version_of(deployment, "acme")
    names = {first[:16]: FIRST, second[:16]: SECOND}
    assert whole.result().status_code == 200, whole.result().text
    choices = [stream.result(), *whole.result().json()["choices"]]
    for choice in choices:
        found = assert_by_spans(deployment, case.prompt, choice, names)
        assert found == [FIRST, FIRST, SECOND]
    deployment.assert_serves("acme", deployment.case(SECOND))
    refused = deployment.load("acme", two, **SWAP, expected_version=first)
    assert refused.status_code == 409
    assert f"found version {second}, expected {first}" in refused.json()["error"]["message"]
    assert deployment.unload("acme").status_code == 200


def test_a_refused_version_leaves_running_answers_with_theirs(deployment: Deployment) -> None:
    case, has_begun = deployment.case(FIRST), threading.Event()
    assert deployment.load("acme", deployment.put(FIRST, "one"), **SWAP).status_code == 200
    bad = deployment.put(SECOND, "bad")
    (bad / "adapter_model.safetensors").write_bytes(b"no tensors")
    with ThreadPoolExecutor() as threads:
        stream = threads.submit(streamed, deployment, case, has_begun)
        assert has_begun.wait(60)
        assert deployment.load("acme", bad, **SWAP).status_code == 400
    names = {version_of(deployment, "acme")[:16]: FIRST}
    assert assert_by_spans(deployment, case.prompt, stream.result(), names) == [FIRST, FIRST]
    deployment.assert_serves("acme", case)
    assert deployment.unload("acme").status_code == 200


def test_what_cannot_be_swapped_in_flight_is_refused_with_a_reason(deployment: Deployment) -> None:
    one = deployment.put(FIRST, "one")
    for options, status, reason in (
        ({"swap": "in_flight"}, 400, "needs 'load_inplace': true"),
        ({"swap": "at_once", "load_inplace": True}, 400, "swap"),
        ({"expected_version": "0" * 16}, 409, "found version none, expected 0000"),
    ):
        refused = deployment.load("acme", one, **options)
        assert refused.status_code == status, refused.text
        assert reason in refused.json()["error"]["message"]
    assert deployment.ask("acme", deployment.case(FIRST)).status_code == 404
