"""Which weights answer a name, on each route that generates, with tenants and several servers."""

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from vllm_multilora.tenants.keys import stored

from .bases.test_classification import text
from .models.cases import NEW_TOKENS, Case, Scenario
from .models.recipes import LINEAR_RECIPES
from .server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

BASE = "base"
OWN, OTHERS, RELOADED = (recipe.name for recipe in LINEAR_RECIPES[:3])
ACME, ADMIN = "sk-acme", "sk-operator-0123456789abcdef"
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LENGTH = 23
INTERNAL = re.compile(r"multilora-\d")
"""What no answer may hold: the beginning of a name that only vLLM gets."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Route:
    """How to ask one of vLLM's routes, and what its answer and its events say."""

    path: str
    ask: Callable[[Case], Body]
    said: Callable[[Body], str]
    reported: Callable[[Body], str]


def chat(case: Case) -> Body:
    return {"messages": [{"role": "user", "content": text(case.prompt)}], "max_tokens": NEW_TOKENS}


def prompt(case: Case) -> Body:
    return {"prompt": text(case.prompt), "max_tokens": NEW_TOKENS}


def chat_delta(event: Body) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))


ROUTES = [
    Route(
        "/v1/completions",
        prompt,
        lambda body: str(body["choices"][0]["text"]),
        lambda event: "".join(choice["text"] for choice in event.get("choices", ())),
    ),
    Route(
        "/v1/chat/completions",
        chat,
        lambda body: str(body["choices"][0]["message"]["content"]),
        chat_delta,
    ),
    Route(
        "/invocations", chat, lambda body: str(body["choices"][0]["message"]["content"]), chat_delta
    ),
    Route(
        "/v1/responses",
        lambda case: {"input": text(case.prompt), "max_output_tokens": NEW_TOKENS, "store": False},
        lambda body: str(body["output"][0]["content"][0]["text"]),
        lambda event: event["delta"] if event.get("type") == "response.output_text.delta" else "",
    ),
    Route(
        "/v1/messages",
        chat,
        lambda body: str(body["content"][0]["text"]),
        lambda event: event.get("delta", {}).get("text", ""),
    ),
]


def case_of(llama: Scenario, name: str | None) -> Case:
    return next(case for case in llama.cases_of(name) if len(case.prompt) == LENGTH)


def words(case: Case) -> list[str]:
    """What PEFT answers."""
    return text(case.expected.tokens).split()


@pytest.fixture(scope="module")
def server(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("weights")
    tenants = folder / "tenants.json"
    acme = {"keys": [stored(ACME)], "adapters": [OWN]}
    tenants.write_text(json.dumps({"tenants": {"acme": acme}}))
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--chat-template", CHAT, "--max-model-len", "128", "--max-num-seqs", "16"),
        *("--block-size", "32", "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2"),
        *("--max-lora-rank", "64", "--api-server-count", "2"),
        *("--multilora-tenants", str(tenants)),
        *("--lora-modules", *(f"{name}={llama.adapters[name]}" for name in (OWN, OTHERS))),
        log=folder / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "MULTILORA_ADMIN_KEY": ADMIN},
        api_key=ADMIN,
    ) as running:
        yield running


def post(server: VllmServer, path: str, body: Body, key: str) -> httpx.Response:
    """An answer by a connection of its own, to whichever API server takes it."""
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(server.url + path, json=body, headers=headers, timeout=120, trust_env=False)


def answer(server: VllmServer, route: Route, case: Case, model: str, key: str, **more: Any) -> Any:
    """The words of an answer to a case; its status where it is an error."""
    body = {"model": model, "temperature": 0, **route.ask(case), **more}
    response = post(server, route.path, body, key)
    reported = f"{response.text}{response.headers}".replace(model, "")
    assert not INTERNAL.search(reported), reported
    if not response.is_success:
        return response.status_code
    if not more.get("stream"):
        found = response.json()
        assert found["model"] == model.partition("@")[0]
        return route.said(found).split()
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line) for line in data]
    named = {event["model"] for event in events if "model" in event}
    assert named <= {model.partition("@")[0]}
    return "".join(map(route.reported, events)).split()


def version(server: VllmServer, name: str) -> str:
    listed = server.get("/v1/models").json()["data"]
    return next(str(card["digest"])[:16] for card in listed if card["id"] == name)


@pytest.mark.smoke("which weights answer a name")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ROUTES, ids=[route.path for route in ROUTES])
def test_each_name_is_answered_by_its_weights_or_refused(
    server: VllmServer, llama: Scenario, route: Route, stream: bool
) -> None:
    own, others, base = (case_of(llama, name) for name in (OWN, OTHERS, None))
    digits = version(server, OWN)
    expected: list[tuple[str, str, Case, Any]] = [
        (ACME, OWN, own, words(own)),
        (ACME, f"{OWN}@{digits}", own, words(own)),
        (ACME, f"{OWN}@{'0' * 16}", own, 409),
        (ACME, OTHERS, others, 404),
        (ACME, BASE, base, 404),
        (ACME, "nobody", base, 404),
        (ACME, f"multilora-1-{'0' * 16}", own, 404),
        (ADMIN, OTHERS, others, words(others)),
        (ADMIN, BASE, base, words(base)),
        (ADMIN, f"multilora-1-{'0' * 16}", own, 404),
    ]
    with ThreadPoolExecutor(8) as pool:
        asked = [
            (
                key,
                model,
                requested,
                pool.submit(answer, server, route, case, model, key, stream=stream),
            )
            for key, model, case, requested in expected * 2
        ]
        for key, model, requested, found in asked:
            assert found.result() == requested, (key, model, server.log_tail())


@pytest.mark.smoke("which weights answer a name")
def test_tokens_are_made_for_the_name_that_is_asked_and_for_no_unknown_one(
    server: VllmServer,
) -> None:
    for key, model, status in (
        (ACME, OWN, 200),
        (ACME, OTHERS, 404),
        (ADMIN, OTHERS, 200),
        (ADMIN, "nobody", 404),
    ):
        found = post(server, "/tokenize", {"model": model, "prompt": "t5 t17"}, key)
        assert found.status_code == status, found.text


@pytest.mark.smoke("which weights answer a name")
def test_answers_begun_before_a_reload_end_on_the_old_weights(
    server: VllmServer, llama: Scenario
) -> None:
    """On whichever API server they are, and the reload is."""
    completions = ROUTES[0]
    cases = {name: case_of(llama, name) for name in (OWN, OTHERS)}

    def load(source: str) -> None:
        body = {"lora_name": RELOADED, "lora_path": str(llama.adapters[source])}
        found = post(server, "/v1/load_lora_adapter", {**body, "load_inplace": True}, ADMIN)
        assert found.status_code == 200, found.text

    def stream(source: str) -> list[str]:
        found = answer(server, completions, cases[source], RELOADED, ADMIN, stream=True)
        assert isinstance(found, list), found
        return found

    def either(case: Case) -> Any:
        return answer(server, completions, case, RELOADED, ADMIN, stream=True)

    load(OWN)
    for before, after in ((OWN, OTHERS), (OTHERS, OWN)):
        with ThreadPoolExecutor(8) as pool:
            assert stream(before) == words(cases[before])
            begun = [pool.submit(either, cases[before]) for _ in range(8)]
            load(after)
            # Each is whole: by the weights before or after, and never begun by one set of them.
            alone = answer(server, completions, cases[before], RELOADED, ADMIN)
            for each in begun:
                assert each.result() in (words(cases[before]), alone)
            assert stream(after) == words(cases[after])
    gone = post(server, "/v1/unload_lora_adapter", {"lora_name": RELOADED}, ADMIN)
    assert gone.status_code == 200, gone.text
    assert answer(server, completions, cases[OWN], RELOADED, ADMIN) == 404
    sagemaker = {"name": RELOADED, "src": str(llama.adapters[OWN])}
    assert post(server, "/adapters", sagemaker, ADMIN).text == f"Adapter {RELOADED} registered"
    assert stream(OWN) == words(cases[OWN])
    headers = {"Authorization": f"Bearer {ADMIN}"}
    with httpx.Client(trust_env=False, headers=headers, timeout=120) as client:
        found = client.delete(f"{server.url}/adapters/{RELOADED}")
    assert found.text == f"Adapter {RELOADED} unregistered"
    assert answer(server, completions, cases[OWN], RELOADED, ADMIN) == 404
