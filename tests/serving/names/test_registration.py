"""The routes for loading and unloading adapters: exact answers, freed memory, clean reloads."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import psutil
import pytest

from tests.adapters.corpus import BAD
from tests.unit.docs.test_docs import ROOT
from tests.unit.docs.test_documented_commands import commands
from vllm_multilora.cli import main

from .. import completions, template
from ..models.cases import NEW_TOKENS, Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer

pytestmark = pytest.mark.serving

BASE = "base"
NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES)
# Longer than a block of the prefix cache.
LENGTH = 40
LONGEST = 16384
MAX_TOKENS = LONGEST - 100
# Many times what the short requests of these tests take.
UNLOAD_TIMEOUT_S = 5


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: Scenario
    root: Path

    def case(self, name: str) -> Case:
        return next(c for c in self.scenario.cases_of(name) if len(c.prompt) == LENGTH)

    def put(self, source: str, folder: str) -> Path:
        """The files of an adapter, in a folder that adapters may come from."""
        target = self.root / folder
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.scenario.adapters[source], target))

    def load(self, name: str, path: Path | str, **options: object) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(path), **options}
        return self.server.post("/v1/load_lora_adapter", body)

    def unload(self, name: str) -> httpx.Response:
        return self.server.post("/v1/unload_lora_adapter", {"lora_name": name})

    def adapters(self) -> dict[str, Any]:
        """What the server says of its adapters, slots and host memory."""
        response = self.server.get("/v1/lora_adapters")
        assert response.status_code == 200, response.text
        return response.json()

    def await_running(self, name: str, requests: int) -> None:
        """Returns when an adapter has so many requests in the engine, and a slot."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            (row,) = (row for row in self.adapters()["data"] if row["id"] == name)
            if row["requests"] == requests and row["state"] == "slot":
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} never had {requests} requests:\n{self.server.log_tail()}")

    def tokens_until(self, over: threading.Event, model: str, case: Case) -> list[int]:
        """A stream's tokens until something is over, and twenty more, which must still come."""
        body = completions.body(model, case, max_tokens=MAX_TOKENS, stream=True)
        tokens: list[int] = []
        more = 20
        with (
            httpx.Client(trust_env=False, verify=False, timeout=60) as client,
            client.stream("POST", f"{self.server.url}/v1/completions", json=body) as response,
        ):
            for line in filter(None, response.iter_lines()):
                tokens += tokens_of([json.loads(line.removeprefix("data: "))])
                more -= over.is_set()
                if not more:
                    return tokens
        raise AssertionError(f"the stream ended after {len(tokens)} tokens")

    def ask(self, model: str, case: Case, **options: object) -> httpx.Response:
        return completions.ask(self.server, model, case, **options)

    def assert_serves(self, model: str, case: Case) -> None:
        completions.assert_serves(self.server, model, case)


def with_long_context(base: Path, path: Path) -> Path:
    """The same model, so that a stream can outlast the time limit of an unload."""
    shutil.copytree(base, path)
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = LONGEST
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("allowed")
    with VllmServer(
        with_long_context(llama.base, tmp_path_factory.mktemp("long") / "base"),
        *("--served-model-name", BASE),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", str(LONGEST), "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-lora-rank", "64"),
        *("--stream-interval", "20"),  # so that clients keep up with long streams
        *("--multilora-allowed-roots", str(root)),
        *("--multilora-unload-timeout-s", str(UNLOAD_TIMEOUT_S)),
        log=tmp_path_factory.mktemp("registration") / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, llama, root)


@pytest.mark.smoke("registration over HTTP")
def test_a_loaded_adapter_serves_at_once_and_an_unloaded_one_no_more(
    deployment: Deployment,
) -> None:
    case = deployment.case(NAMES[0])
    assert deployment.load("acme", deployment.put(NAMES[0], "acme")).status_code == 200
    deployment.assert_serves("acme", case)
    models = deployment.server.get("/v1/models").json()["data"]
    assert {model["id"]: model["parent"] for model in models}["acme"] == BASE
    assert deployment.load("acme", deployment.root / "acme").status_code == 400  # has been loaded
    assert deployment.unload("acme").status_code == 200
    assert deployment.ask("acme", case).status_code == 404
    assert deployment.unload("acme").status_code == 404
    assert deployment.load("acme", deployment.root / "acme").status_code == 200
    deployment.assert_serves("acme", case)
    deployment.unload("acme")


@pytest.mark.smoke("registration over HTTP")
def test_the_adapters_command_loads_a_folder_and_what_has_changed_in_it(
    deployment: Deployment, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = deployment.root / "synced"
    command = ["adapters", "sync", str(folder), "--workers", deployment.server.url]
    for place, name in enumerate(NAMES[:2]):
        deployment.put(name, f"synced/sync-{place}")
    assert main(command) == 0
    for place, name in enumerate(NAMES[:2]):
        deployment.assert_serves(f"sync-{place}", deployment.case(name))
    deployment.put(NAMES[1], "synced/sync-0")
    assert main(command) == 0
    deployment.assert_serves("sync-0", deployment.case(NAMES[1]))
    bad = deployment.put(NAMES[0], "synced/sync-bad") / "adapter_config.json"
    bad.write_text(json.dumps(json.loads(bad.read_text()) | {"use_dora": True}))
    capfd.readouterr()
    assert main(command) == 1
    said = capfd.readouterr().err
    assert f"{deployment.server.url}: sync-bad refused: " in said
    assert "use_dora" in said
    assert deployment.ask("sync-bad", deployment.case(NAMES[0])).status_code == 404
    for place in range(2):
        assert deployment.unload(f"sync-{place}").status_code == 200


def test_equal_loads_at_once_all_succeed_and_load_once(deployment: Deployment) -> None:
    """As Ray sends them: one for each request that comes before a cold adapter is loaded."""
    path = deployment.put(NAMES[0], "burst")
    for attempt in range(8):  # on a busy machine a client may come when the load has ended
        name = f"burst-{attempt}"
        with ThreadPoolExecutor(6) as clients:
            answers = [*clients.map(lambda _, n=name: deployment.load(n, path), range(6))]
        success = 200, f"Success: LoRA adapter '{name}' added successfully."
        if {(answer.status_code, answer.text) for answer in answers} == {success}:
            break
    else:
        pytest.fail(f"not all have succeeded: {[answer.text for answer in answers]}")
    deployment.assert_serves(name, deployment.case(NAMES[0]))
    assert deployment.load(name, path).status_code == 400, "did not wait for any"
    for number in range(attempt + 1):
        assert deployment.unload(f"burst-{number}").status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_calls_of_the_docs_load_an_adapter_ask_it_and_unload_it(deployment: Deployment) -> None:
    """Word for word, but for the address and the folder."""
    pages = ("docs/adapters.md", "README.md")
    load, unload, ask = (
        command for page in pages for command in commands(ROOT / page) if "curl" in command
    )
    folder = str(deployment.put(NAMES[0], "acme"))
    own = {"http://localhost:8000": deployment.server.url, "/adapters/acme": folder}
    answers = []
    for command in (load, ask, unload):
        for named, here in own.items():
            command = command.replace(named, here)
        curl = ["bash", "-c", f"{command} --fail-with-body --noproxy '*'"]
        answers.append(subprocess.run(curl, check=True, capture_output=True, text=True).stdout)
    loaded, asked, unloaded = answers
    assert "added successfully" in loaded
    assert json.loads(asked)["model"] == "acme"
    assert "removed successfully" in unloaded


@pytest.mark.smoke("registration over HTTP")
def test_all_problems_of_a_bad_adapter_are_reported_at_once(deployment: Deployment) -> None:
    folder = deployment.put(NAMES[0], "bad")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 4 * config["r"], "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    response = deployment.load("bad", folder)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["code"] == 400
    assert error["param"] == "lora_path"
    codes = {problem["code"] for problem in error["problems"]}
    assert {"rank-not-as-configured", "unsupported-feature"} <= codes
    for problem in error["problems"]:
        assert problem["file"]
        assert problem["message"] in error["message"]
    assert "use_dora" in error["message"]
    assert deployment.ask("bad", deployment.case(NAMES[0])).status_code == 404


def test_every_bad_adapter_of_the_corpus_is_refused_and_harms_nobody(
    deployment: Deployment,
) -> None:
    good = deployment.case(NAMES[3])
    assert deployment.load("good", deployment.put(NAMES[3], "good")).status_code == 200
    wrong = {}
    for name, case in BAD.items():
        if case.is_right_untied:  # as the base model is here
            continue
        folder = case.write(deployment.root / f"corpus-{name}")
        response = deployment.load("bad", folder)
        error = response.json()["error"]
        codes = [problem["code"] for problem in error.get("problems", ())]
        is_exact = codes == [str(code) for code in case.codes] and case.file in error["message"]
        if response.status_code == 403:  # a link to outside is refused before it is looked at
            is_exact = codes == ["not-allowed"]
        if response.status_code not in (400, 403, 404) or not is_exact:
            wrong[name] = response.text
        deployment.assert_serves("good", good)
    assert not wrong
    deployment.unload("good")


def test_refusals_are_as_the_servers_document_describes_them(
    deployment: Deployment, tmp_path: Path
) -> None:
    bad = deployment.put(NAMES[0], "described")
    (bad / "adapter_config.json").write_text("{")
    document = deployment.server.get("/openapi.json").json()
    answers = document["paths"]["/v1/load_lora_adapter"]["post"]["responses"]
    for path, status in ((bad, 400), (tmp_path, 403), (deployment.root / "nobody", 404)):
        response = deployment.load("described", path)
        assert response.status_code == status, response.text
        content = answers[str(status)]["content"]["application/json"]
        jsonschema.validate(response.json(), document | content["schema"])
        (problem,) = response.json()["error"]["problems"]
        assert problem.keys() == document["components"]["schemas"]["Problem"]["properties"].keys()


def test_nothing_is_fetched_from_a_url_that_is_not_allowed(deployment: Deployment) -> None:
    response = deployment.load("nobody", "s3://bucket/acme/v1")
    assert response.status_code == 403
    error = response.json()["error"]
    assert "s3://bucket/acme/v1 is outside the sources" in error["message"]
    assert "--multilora-allowed-roots s3://bucket/acme/" in error["problems"][0]["hint"]


@pytest.mark.parametrize("way", ["elsewhere", "dots", "link", "linked-file", "hub-name"])
def test_adapters_come_from_the_allowed_folders_only(
    deployment: Deployment, tmp_path: Path, way: str
) -> None:
    outside = shutil.copytree(deployment.scenario.adapters[NAMES[0]], tmp_path / "outside")
    path: Path | str = outside
    if way == "dots":
        path = f"{deployment.root}/{'../' * len(deployment.root.parts)}{str(outside)[1:]}"
    elif way == "link":
        path = deployment.root / "link"
        path.unlink(missing_ok=True)
        path.symlink_to(outside)
    elif way == "linked-file":
        path = deployment.put(NAMES[0], "linked")
        (path / "adapter_model.safetensors").unlink()
        (path / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    elif way == "hub-name":
        path = "somebody/adapter"
    response = deployment.load("intruder", path)
    # What may be a repository of the hub is not found, since the hub is not asked.
    assert response.status_code == (404 if way == "hub-name" else 403), response.text
    assert deployment.ask("intruder", deployment.case(NAMES[0])).status_code == 404


@pytest.mark.smoke("reload beside running requests", "prefix caching")
def test_a_reload_serves_the_new_weights_whatever_is_cached(deployment: Deployment) -> None:
    """From the same path, with the prefix cache full of blocks of the old weights.

    The answers are PEFT's, and those under a name that has never had the old weights.
    """
    old, new = deployment.case(NAMES[0]), deployment.case(NAMES[4])
    prompts = [deployment.case(name) for name in NAMES]
    assert deployment.load("fresh", deployment.put(NAMES[4], "fresh")).status_code == 200
    fresh = [completions.token_ids(deployment.ask("fresh", case)) for case in prompts]
    deployment.unload("fresh")
    folder = deployment.put(NAMES[0], "versions")
    assert deployment.load("versions", folder).status_code == 200
    for _ in range(2):
        deployment.assert_serves("versions", old)
        for case in prompts:  # caches every prompt under the old weights
            deployment.ask("versions", case)
    deployment.put(NAMES[4], "versions")
    assert deployment.load("versions", folder, load_inplace=True).status_code == 200
    deployment.assert_serves("versions", new)
    answers = [completions.token_ids(deployment.ask("versions", case)) for case in prompts]
    deployment.unload("versions")
    assert answers == fresh


@pytest.mark.smoke("reload beside running requests")
def test_a_failed_reload_leaves_the_old_version_serving(deployment: Deployment) -> None:
    case = deployment.case(NAMES[1])
    folder = deployment.put(NAMES[1], "stays")
    assert deployment.load("stays", folder).status_code == 200
    (folder / "adapter_model.safetensors").write_bytes(b"half an upload")
    assert deployment.load("stays", folder, load_inplace=True).status_code == 400
    deployment.put(NAMES[1], "stays")
    deployment.assert_serves("stays", case)
    deployment.unload("stays")


@pytest.mark.smoke("reload beside running requests")
def test_requests_in_flight_end_on_the_weights_they_began_with(deployment: Deployment) -> None:
    """While a name is loaded with other weights, again and again."""
    sources = (NAMES[0], NAMES[4])
    cases = [deployment.case(source) for source in sources]
    folders = [deployment.put(source, f"flips-{source}") for source in sources]

    def answer(number: int) -> tuple[int, ...]:
        response = deployment.ask("flips", cases[number % 2])
        assert response.status_code == 200, response.text
        return completions.token_ids(response)

    possible: list[set[tuple[int, ...]]] = [set(), set()]
    for folder in folders:
        assert deployment.load("flips", folder, load_inplace=True).status_code == 200
        for number in range(2):
            possible[number].add(answer(number))
    assert all(len(answers) == 2 for answers in possible)
    stop = threading.Event()

    def reload() -> int:
        count = 0
        while not stop.is_set():
            response = deployment.load("flips", folders[count % 2], load_inplace=True)
            assert response.status_code == 200, response.text
            count += 1
        return count

    with ThreadPoolExecutor(5) as pool:
        reloading = pool.submit(reload)
        try:
            answers = list(pool.map(answer, range(40)))
        finally:
            stop.set()
        assert reloading.result() > 1
    for number, found in enumerate(answers):
        assert found in possible[number % 2]
    deployment.unload("flips")


@pytest.mark.smoke("registration over HTTP")
def test_unloading_lets_running_requests_end(deployment: Deployment) -> None:
    case = deployment.case(NAMES[2])
    assert deployment.load("leaves", deployment.put(NAMES[2], "leaves")).status_code == 200
    deployment.assert_serves("leaves", case)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(deployment.ask, "leaves", case, max_tokens=80) for _ in range(3)]
        assert deployment.unload("leaves").status_code == 200
        for future in running:
            response = future.result()
            # Those that had not been accepted when the name went are refused.
            assert response.status_code in (200, 404)
            if response.status_code == 200:
                tokens = completions.token_ids(response)
                assert len(tokens) == 80
                assert tokens[:NEW_TOKENS] == case.expected.tokens
    assert deployment.server.get("/health").status_code == 200


@pytest.mark.smoke("registration over HTTP")
def test_requests_that_outlast_the_time_limit_of_an_unload_are_ended_with_a_reason(
    deployment: Deployment,
) -> None:
    """Another customer's stream goes on, memory is free, and the name can be used again."""
    names = {"endless": NAMES[0], "other": NAMES[1]}
    for name, source in names.items():
        assert deployment.load(name, deployment.put(source, name)).status_code == 200
    endless, other = (deployment.case(source) for source in names.values())
    with ThreadPoolExecutor(3) as pool:
        # At a third of a millisecond a token, and no engine is as fast, they outlast the limit.
        streams = [
            pool.submit(deployment.ask, "endless", endless, max_tokens=MAX_TOKENS, stream=True)
            for _ in range(2)
        ]
        over = threading.Event()
        untouched = pool.submit(deployment.tokens_until, over, "other", other)
        deployment.await_running("endless", 2)
        deployment.await_running("other", 1)
        before = deployment.adapters()
        began = time.monotonic()
        assert deployment.unload("endless").status_code == 200
        took = time.monotonic() - began
        after = deployment.adapters()
        ended = [events_of(stream.result()) for stream in streams]
        over.set()
        going_on = untouched.result()
    # The tiny model computes tokens faster than a busy server writes them: the streams are ended in
    # time, and what they had by then is written first.
    assert UNLOAD_TIMEOUT_S <= took < 20 * UNLOAD_TIMEOUT_S
    # What earlier tests have unloaded may have gone meanwhile too.
    assert "endless" not in {row["id"] for row in after["data"]}
    assert after["slots"]["free"] > before["slots"]["free"]
    assert after["cpu"]["adapters"] < before["cpu"]["adapters"]
    assert after["cpu"]["bytes"] < before["cpu"]["bytes"]
    for events in ended:
        tokens, error = tokens_of(events[:-1]), events[-1]["error"]
        assert tokens[:NEW_TOKENS] == list(endless.expected.tokens)
        assert error["code"] == 404
        assert "adapter 'endless' was unloaded" in error["message"]
        assert f"within the {UNLOAD_TIMEOUT_S} s" in error["message"]
        assert "--multilora-unload-timeout-s" in error["message"]
    assert going_on[:NEW_TOKENS] == list(other.expected.tokens)
    assert deployment.load("endless", deployment.put(NAMES[4], "again")).status_code == 200
    deployment.assert_serves("endless", deployment.case(NAMES[4]))
    for name in names:
        deployment.unload(name)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """A stream's events, without the one that only says that it is over."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def tokens_of(events: list[dict[str, Any]]) -> list[int]:
    return [token for event in events for token in event["choices"][0]["token_ids"] or ()]


def test_memory_does_not_grow_with_adapters_that_came_and_went(deployment: Deployment) -> None:
    """The thousand cycles of benchmarks/cold/registration_cycles.py, in small."""
    folders = [deployment.put(name, f"cycle-{name}") for name in NAMES]

    def cycle(number: int) -> None:
        name, folder = f"cycle-{number}", folders[number % len(folders)]
        assert deployment.load(name, folder).status_code == 200
        assert deployment.ask(name, deployment.case(NAMES[0]), max_tokens=2).status_code == 200
        assert deployment.unload(name).status_code == 200

    def resident() -> int:
        parent = psutil.Process(deployment.server.pid)
        processes = [parent, *parent.children(recursive=True)]
        return sum(each.memory_info().rss for each in processes if each.name() != template.NAME)

    for number in range(20):
        cycle(number)
    before = resident()
    for number in range(20, 60):
        cycle(number)
    assert resident() < 1.02 * before


def test_the_example_of_continuous_deployment(deployment: Deployment) -> None:
    """A good version is switched to; a bad one changes nothing, and says why."""
    old, new = deployment.case(NAMES[0]), deployment.case(NAMES[4])
    deployment.load("deployed", deployment.put(NAMES[0], "deployed-v1"))
    versions = [deployment.put(NAMES[4], f"deployed-v{number}") for number in (2, 3)]
    (versions[1] / "adapter_model.safetensors").write_bytes(b"half an upload")
    example = Path(__file__).parents[3] / "examples" / "patterns" / "continuous_deployment.py"

    def deploy(folder: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                *(sys.executable, str(example), "--url", deployment.server.url),
                *("--name", "deployed", "--path", str(folder), "--check", "t1 t2 t3"),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    deployment.assert_serves("deployed", old)
    assert deploy(versions[0]).returncode == 0
    deployment.assert_serves("deployed", new)
    refused = deploy(versions[1])
    assert refused.returncode == 1
    assert "adapter_model.safetensors" in refused.stderr
    deployment.assert_serves("deployed", new)
    assert deployment.ask("deployed-candidate", new).status_code == 404
    deployment.unload("deployed")
