"""Which weights answered, who used how much, and what routers can read: over HTTP."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ..completions import body, token_ids
from ..exposition import scrape
from ..metered import LIMIT_S, User, Work, assert_adds_up, logged
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer
from .test_registration import with_long_context

pytestmark = pytest.mark.serving

NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES[:5])
BASE, ROUTE, PLAIN, LEAVING, PINNED = "base", "support", "plain", "leaving", "pinned"
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LONGEST = 512
MIXED = int(os.environ.get("MULTILORA_METERED_REQUESTS", "120"))


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: Scenario
    root: Path

    def put(self, source: str, folder: str) -> Path:
        """The files of an adapter in a folder, in place of what is there."""
        return Path(
            shutil.copytree(self.scenario.adapters[source], self.root / folder, dirs_exist_ok=True)
        )

    @property
    def log(self) -> Path:
        return self.root / "usage.jsonl"

    def load(self, name: str, source: str) -> str:
        """Serves an adapter's weights under a name; returns their digest."""
        folder = self.put(source, f"{name}-{source}")
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        response = self.server.post("/v1/load_lora_adapter", body)
        assert response.status_code == 200, response.text
        return self.digest(name)

    def digest(self, name: str) -> str:
        (row,) = self.rows("/v1/lora_adapters", name)
        assert row["digest"] is not None
        return row["digest"]

    def rows(self, path: str, name: str) -> list[dict[str, Any]]:
        return [row for row in self.server.get(path).json()["data"] if row["id"] == name]

    def post(self, path: str, content: dict[str, Any]) -> httpx.Response:
        return self.server.post(path, content)

    def ask(self, model: str, source: str, **options: object) -> httpx.Response:
        return self.post("/v1/completions", body(model, self.case(source), **options))

    def case(self, source: str) -> Case:
        return self.scenario.cases_of(source)[-1]


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("identity")
    (root / "chat.jinja").write_text(CHAT)
    (root / "routes.yaml").write_text(f"routes:\n  {ROUTE}:\n    adapter: {NAMES[0]}\n")
    (root / "required.json").write_text('{"*": "any"}')
    with VllmServer(
        with_long_context(llama.base, root / "base"),
        *("--served-model-name", BASE),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", str(LONGEST), "--max-num-seqs", "16", "--block-size", "32"),
        *("--num-gpu-blocks-override", "24"),  # too few for all: requests are preempted
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
        *("--enable-prompt-tokens-details", "--chat-template", str(root / "chat.jinja")),
        *("--multilora-routes", str(root / "routes.yaml"), "--multilora-route-names"),
        *("--multilora-usage-log", str(root / "usage.jsonl")),
        *("--multilora-pin", PINNED),
        *("--multilora-require-digest", str(root / "required.json")),
        log=root / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, llama, root)


def named(answer: httpx.Response | dict[str, Any]) -> tuple[str, str] | None:
    """The adapter and version that an answer names."""
    if isinstance(answer, httpx.Response):
        assert answer.status_code == 200, answer.text
        answer = answer.json()
    found = answer.get("multilora")
    return None if found is None else (found["adapter"], found["version"])


def test_an_answer_says_which_weights_made_it(deployment: Deployment) -> None:
    first, second = NAMES[:2]
    for source in (first, second, first):
        digest = deployment.load("served", source)
        began = time.time()
        for _ in range(2):
            answer = deployment.ask("served", source)
            assert token_ids(answer) == deployment.case(source).expected.tokens
            assert named(answer) == ("served", digest[:16])
            assert answer.headers["x-multilora-adapter"] == "served"
            assert answer.headers["x-multilora-version"] == digest[:16]
            (card,) = deployment.rows("/v1/models", "served")
            assert card["digest"] == digest
            assert began - 60 < card["created"] <= time.time()
    base = deployment.post("/v1/completions", body(BASE, deployment.case(first)))
    assert named(base) is None
    assert "x-multilora-version" not in base.headers


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/completions", {"prompt": "t5 t17", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "t5"}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "t5"}], "max_tokens": 2}),
        ("/v1/responses", {"input": "t5", "max_output_tokens": 2, "store": False}),
    ],
    ids=["completions", "chat", "messages", "responses"],
)
def test_a_route_keeps_its_name_in_answers_where_that_is_asked_for(
    deployment: Deployment, path: str, content: dict[str, Any]
) -> None:
    deployment.load(NAMES[0], NAMES[0])
    content = {"max_tokens": 2, **content} if path != "/v1/responses" else content
    answer = deployment.post(path, {"model": ROUTE, **content})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == ROUTE
    assert answer.headers["x-multilora-adapter"] == NAMES[0]
    stream = deployment.post(path, {"model": ROUTE, "stream": True, **content})
    assert f'"model":"{ROUTE}"' in stream.text
    assert f'"model":"{NAMES[0]}"' not in stream.text
    assert deployment.post(path, {"model": NAMES[0], **content}).json()["model"] == NAMES[0]
    assert deployment.post(path, {"model": BASE, **content}).json()["model"] == BASE


def test_an_answers_id_is_that_of_its_header(deployment: Deployment) -> None:
    deployment.load("served", NAMES[0])
    answer = deployment.ask("served", NAMES[0])
    assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}"
    own = deployment.ask("served", NAMES[0], request_id="order-7").json()
    assert own["id"] == "cmpl-order-7"
    refused = deployment.ask("nobody", NAMES[0])
    assert refused.json()["request_id"] == refused.headers["x-request-id"]


def test_a_models_own_route_says_what_the_list_does(deployment: Deployment) -> None:
    deployment.load("listed", NAMES[0])
    models = deployment.server.get("/v1/models").json()["data"]
    assert len({model["max_model_len"] for model in models} - {None}) == 1
    for model in models:
        alone = deployment.server.get(f"/v1/models/{model['id']}").json()
        made_anew = {"created": 0, "permission": []}
        assert alone | made_anew == model | made_anew
    missing = deployment.server.get("/v1/models/nobody")
    assert missing.status_code == 404
    assert missing.json()["error"]["message"] == "The model `nobody` does not exist."


def test_a_client_may_ask_for_one_version(deployment: Deployment) -> None:
    old = deployment.load("wanted", NAMES[0])
    new = deployment.load("wanted", NAMES[1])
    for _ in range(2):
        answer = deployment.ask(f"wanted@{new[:12]}", NAMES[1])
        assert named(answer) == ("wanted", new[:16])
        assert token_ids(answer) == deployment.case(NAMES[1]).expected.tokens
        refused = deployment.ask(f"wanted@{old}", NAMES[0])
        assert refused.status_code == 409
        assert f"is served in version {new[:16]}" in refused.json()["error"]["message"]
    assert deployment.ask(f"nobody@{new}", NAMES[0]).status_code == 404
    assert deployment.ask(f"{BASE}@{new}", NAMES[0]).status_code == 404


def test_a_stream_that_runs_across_a_reload_names_the_version_that_makes_it(
    deployment: Deployment,
) -> None:
    old = deployment.load("streams", NAMES[0])
    content = body("streams", deployment.case(NAMES[0]), max_tokens=400, stream=True)
    with (
        httpx.Client(trust_env=False, timeout=120) as client,
        client.stream("POST", f"{deployment.server.url}/v1/completions", json=content) as stream,
    ):
        events = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
        assert named(json.loads(next(events))) == ("streams", old[:16])
        assert stream.headers["x-multilora-version"] == old[:16]
        new = deployment.load("streams", NAMES[1])
        assert named(deployment.ask("streams", NAMES[1])) == ("streams", new[:16])
        rest = [json.loads(event) for event in events if event != "[DONE]"]
    assert old != new
    assert not any(map(named, rest))
    assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_files_that_change_behind_its_back_are_named_as_what_they_are(
    deployment: Deployment,
) -> None:
    """Whoever asked for the registered version is told; the others get what is there."""
    registered, new = deployment.load("swapped", NAMES[0]), deployment.load("other", NAMES[1])
    deployment.put(NAMES[1], f"swapped-{NAMES[0]}")
    for number, name in enumerate(NAMES[2:]):  # it leaves its slot, and host memory
        deployment.load(f"filler-{number}", name)
        assert deployment.ask(f"filler-{number}", name).status_code == 200
    refused = deployment.ask(f"swapped@{registered}", NAMES[0])
    assert refused.status_code == 409, refused.text
    assert f"has become version {new[:16]}" in refused.json()["error"]["message"]
    answer = deployment.ask("swapped", NAMES[1])
    assert token_ids(answer) == deployment.case(NAMES[1]).expected.tokens
    assert named(answer) == ("swapped", new[:16])
    assert answer.headers["x-multilora-version"] == new[:16]


def test_only_the_weights_that_are_required_are_served(deployment: Deployment) -> None:
    digest, other = (deployment.load(f"free-{name}", name) for name in NAMES[:2])
    required = deployment.root / "required.json"
    required.write_text(json.dumps({"only": digest, "*": "any"}))
    folder = deployment.put(NAMES[1], "only")
    register = {"lora_name": "only", "lora_path": str(folder), "load_inplace": True}
    refused = deployment.post("/v1/load_lora_adapter", register)
    assert refused.status_code == 400
    assert f"digest is {other}, expected {digest}" in refused.json()["error"]["message"]
    assert [each["code"] for each in refused.json()["error"]["problems"]] == ["wrong-digest"]
    deployment.put(NAMES[0], "only")
    assert deployment.post("/v1/load_lora_adapter", register).status_code == 200
    assert named(deployment.ask("only", NAMES[0])) == ("only", digest[:16])
    required.write_text(json.dumps({"*": "any"}))
    deployment.put(NAMES[1], "only")
    assert deployment.post("/v1/load_lora_adapter", register).status_code == 200


# Metering.


def test_metered_tokens_are_those_of_the_answers_and_of_the_log(deployment: Deployment) -> None:
    for name in NAMES[:3]:
        deployment.load(name, name)
    digest = deployment.load(PLAIN, NAMES[3])
    deployment.load(LEAVING, NAMES[4])
    users = [User(name, name) for name in NAMES[:3]]
    users += [User(ROUTE, NAMES[0], ROUTE), User(BASE, None)]
    work = Work(users, User(PLAIN, PLAIN), User(LEAVING, LEAVING), LONGEST // 2)
    server = deployment.server
    log = assert_adds_up(server.url, lambda: scrape(server), deployment.log, work, MIXED)
    assert preemptions(deployment) > 0
    assert {line["version"] for line in log if line["adapter"] == PLAIN} == {digest}


def preemptions(deployment: Deployment) -> float:
    lines = scrape(deployment.server).splitlines()
    counts = [line for line in lines if line.startswith("vllm:num_preemptions_total")]
    return sum(float(line.split()[-1]) for line in counts)


def test_what_failed_is_in_the_log_and_costs_nothing(deployment: Deployment) -> None:
    deployment.load("broken", NAMES[0])
    lines = len(logged(deployment.log))
    (deployment.root / f"broken-{NAMES[0]}" / "adapter_model.safetensors").write_bytes(b"half")
    for number, name in enumerate(NAMES[2:]):  # it leaves its slot, and host memory
        deployment.load(f"filler-{number}", name)
        assert deployment.ask(f"filler-{number}", name).status_code == 200
    assert deployment.ask("broken", NAMES[0]).status_code == 400
    (line,) = (
        line for line in logged(deployment.log, lines + 4)[lines:] if line["adapter"] == "broken"
    )
    assert (line["status"], line["prompt_tokens"], line["generation_tokens"]) == ("failed", 0, 0)
    assert line["version"] is None


# Routers.


@dataclass(frozen=True)
class Endpoint:
    """A server as routers see it.

    The first three as the Gateway API inference extension reads `vllm:lora_requests_info`, whose
    newest sample counts; the others as llm-d's router reads the adapters that are loaded.
    """

    running: frozenset[str]
    waiting: frozenset[str]
    max_active: int
    loaded: dict[str, tuple[str, str]]
    gpu_loaded: int
    gpu_slots: int

    @classmethod
    def read(cls, text: str) -> "Endpoint":
        families = {f.name: f.samples for f in text_string_to_metric_families(text)}
        samples = families["vllm:lora_requests_info"]  # none before the first request
        newest = max(samples, key=lambda s: s.value).labels if samples else {}
        running, waiting = (
            frozenset(filter(None, newest.get(f"{kind}_lora_adapters", "").split(",")))
            for kind in ("running", "waiting")
        )
        loaded = [sample.labels for sample in families.get("vllm:lora_adapter_loaded", [])]
        return cls(
            running,
            waiting,
            int(newest.get("max_lora", 0)),
            {labels["adapter_name"]: (labels["level"], labels["pinned"]) for labels in loaded},
            *(int(families[f"vllm:{name}"][0].value) for name in _NUMBERS),
        )


_NUMBERS = ("num_gpu_loaded_lora_adapters", "max_gpu_lora_adapters")


def seen(deployment: Deployment, so: Callable[[Endpoint], bool]) -> Endpoint:
    """What routers see, once it is so."""
    deadline = time.monotonic() + LIMIT_S
    while not so(endpoint := Endpoint.read(scrape(deployment.server))):
        assert time.monotonic() < deadline, endpoint
        time.sleep(0.02)
    return endpoint


def test_routers_read_which_adapters_are_loaded_and_which_wait(deployment: Deployment) -> None:
    for row in deployment.server.get("/v1/lora_adapters").json()["data"]:
        deployment.server.post("/v1/unload_lora_adapter", {"lora_name": row["id"]})
    resting = seen(deployment, lambda e: not (e.running or e.waiting or e.loaded or e.gpu_loaded))
    assert resting.gpu_slots == 2
    x, y, z = NAMES[:3]
    deployment.load("x", x)
    seen(deployment, lambda e: e.loaded == {"x": ("cpu", "false")})  # in host memory
    for name, source in (("x", x), ("y", y)):
        deployment.load(name, source)
        assert deployment.ask(name, source).status_code == 200
    deployment.load("z", z)  # cold: host memory is full
    in_slots = seen(deployment, lambda e: set(e.loaded) == {"x", "y"})
    assert in_slots.loaded == {"x": ("gpu", "false"), "y": ("gpu", "false")}
    assert in_slots.gpu_loaded == 2
    assert deployment.ask("z", z).status_code == 200
    seen(deployment, lambda e: set(e.loaded) == {"y", "z"})  # x was evicted
    is_enough = threading.Event()

    def keep_asking(name: str, source: str) -> None:
        while not is_enough.is_set():
            assert deployment.ask(name, source, max_tokens=100).status_code == 200

    with ThreadPoolExecutor(3) as pool:  # three adapters, for two slots
        asking = [pool.submit(keep_asking, *who) for who in (("x", x), ("y", y), ("z", z))]
        try:
            busy = seen(deployment, lambda e: bool(e.running and e.waiting - e.running))
        finally:
            is_enough.set()
        assert [each.result() for each in asking] == [None] * 3
    assert busy.running < {"x", "y", "z"}
    assert busy.max_active == 2
    seen(deployment, lambda e: not (e.running or e.waiting))
    deployment.load(PINNED, NAMES[3])
    assert deployment.ask(PINNED, NAMES[3]).status_code == 200
    seen(deployment, lambda e: e.loaded.get(PINNED) == ("gpu", "true"))
