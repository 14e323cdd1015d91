"""`--multilora-adapter-dir` over HTTP: five hundred folders, and what becomes of them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from vllm_multilora.gateway.status.status_route import NEW_S

from .. import completions
from ..models.cases import Case, Scenario
from ..models.recipes import EMBEDDING_RECIPE, LINEAR_RECIPES
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES)
FOLDERS = 500
LENGTH = 40
NOTICED_S = 30.0
EXAMPLES = Path(__file__).parents[3] / "examples"


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: Scenario
    directory: Path

    def case(self, source: str) -> Case:
        return next(c for c in self.scenario.cases_of(source) if len(c.prompt) == LENGTH)

    def put(self, source: str, name: str) -> Path:
        """Copies an adapter into the directory as one should: aside, then by a rename."""
        prepared = self.directory / f".{name}"
        shutil.copytree(self.scenario.adapters[source], prepared)
        return prepared.rename(self.directory / name)

    def models(self) -> set[str]:
        return {model["id"] for model in self.server.get("/v1/models").json()["data"]}

    def status(self, name: str) -> int:
        return completions.ask(self.server, name, self.case(NAMES[0])).status_code

    def serves(self, name: str, source: str) -> bool:
        case = self.case(source)
        response = completions.ask(self.server, name, case)
        assert response.status_code == 200, f"{response.text}\n{self.server.log_tail()}"
        return completions.token_ids(response) == case.expected.tokens

    def row(self, name: str) -> dict[str, Any]:
        """What the server says of an adapter."""
        time.sleep(NEW_S)  # an answer may be as old as that
        rows = self.server.get("/v1/lora_adapters").json()["data"]
        return next(row for row in rows if row["id"] == name)

    def resident(self) -> float:
        """Adapters in host memory."""
        families = text_string_to_metric_families(self.server.get("/metrics").text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "vllm:lora_cache_adapters" and sample.labels["tier"] == "cpu"
        )


def customer(number: int) -> tuple[str, str]:
    """A customer's name and the recipe that the customer's adapter is a copy of."""
    return f"customer-{number:03}", NAMES[number % len(NAMES)]


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + NOTICED_S
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.25)
    return holds()


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    directory = tmp_path_factory.mktemp("adapters")
    for name, source in map(customer, range(FOLDERS)):
        (directory / name).mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.link(llama.adapters[source] / file, directory / name / file)
    with VllmServer(
        llama.base,
        *("--served-model-name", "base"),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "8", "--max-lora-rank", "64"),
        *("--multilora-adapter-dir", str(directory)),
        *("--multilora-preload", "customer-498,nobody,customer-497"),
        *("--lora-modules", f"named={llama.adapters[NAMES[0]]}"),
        log=tmp_path_factory.mktemp("directory") / "vllm.log",
        # vLLM's routes for loading adapters stay closed.
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"},
    ) as server:
        yield Deployment(server, llama, directory)


def test_adapters_that_are_read_ahead_are_in_memory_before_anybody_asks(
    deployment: Deployment,
) -> None:
    def ask(name: str) -> tuple[int, str | None]:
        answer = deployment.server.get(f"/v1/lora_adapters/{name}")
        return answer.status_code, answer.json().get("state")

    for name in ("customer-498", "customer-497"):
        assert eventually(lambda name=name: ask(name)[0] == 200)  # type: ignore[misc]
    assert ask("customer-496") == (503, "absent")
    assert ask("nobody") == (404, None)
    assert "nobody was not read ahead: there is none" in deployment.server.log.read_text()


def test_the_probe_of_pods_fails_until_adapters_are_in_memory(deployment: Deployment) -> None:
    """The command of the example for Kubernetes, at this server."""
    pods = yaml.safe_load_all((EXAMPLES / "kubernetes" / "vllm.yaml").read_text())
    (pod,) = (each["spec"]["template"]["spec"] for each in pods if each["kind"] == "Deployment")
    python, flag, program, *_ = pod["containers"][0]["startupProbe"]["exec"]["command"]
    program = program.replace("http://localhost:8000", deployment.server.url)

    def probe(*names: str) -> bool:
        env = {"VLLM_API_KEY": "sk-any", "PATH": os.environ["PATH"]}
        command = [python, flag, program, *names]
        return subprocess.run(command, env=env, check=False, timeout=60).returncode == 0

    assert eventually(lambda: probe("customer-498", "customer-497"))
    assert not probe("customer-498", "customer-495")
    assert not probe("nobody")


def test_all_are_listed_and_serve_on_first_use(deployment: Deployment) -> None:
    expected = {customer(number)[0] for number in range(FOLDERS)}
    assert deployment.models() == {"base", "named", *expected}
    for number in (0, 1, 123, 306, 499):
        name, source = customer(number)
        assert deployment.serves(name, source)
    load = {"lora_name": "x", "lora_path": str(deployment.directory / "customer-000")}
    assert deployment.server.post("/v1/load_lora_adapter", load).status_code == 404


def test_a_new_folder_serves_at_once(deployment: Deployment) -> None:
    assert deployment.status("newcomer") == 404
    deployment.put(NAMES[3], "newcomer")
    assert deployment.serves("newcomer", NAMES[3])
    assert "newcomer" in deployment.models()


def test_a_changed_folder_answers_with_the_new_weights(deployment: Deployment) -> None:
    """The prefix cache is full of blocks of the old ones, and a broken copy comes in between."""
    folder = deployment.put(NAMES[0], "versions")
    for _ in range(2):
        assert deployment.serves("versions", NAMES[0])
        completions.ask(deployment.server, "versions", deployment.case(NAMES[4]))
    weights = folder / "adapter_model.safetensors"
    new = (deployment.scenario.adapters[NAMES[4]] / weights.name).read_bytes()
    config = deployment.scenario.adapters[NAMES[4]] / "adapter_config.json"
    shutil.copyfile(config, folder / config.name)
    weights.write_bytes(new[: len(new) // 2])  # and there the copying stops
    assert eventually(
        lambda: f"{folder} is refused" in deployment.server.log.read_text(errors="replace")
    )
    assert deployment.serves("versions", NAMES[0])
    weights.write_bytes(new)
    assert eventually(lambda: deployment.serves("versions", NAMES[4]))


def test_a_removed_folder_is_not_found_and_its_memory_free(deployment: Deployment) -> None:
    # Weights that no other folder has: equal ones are in memory once, for all.
    folder = deployment.put(EMBEDDING_RECIPE.name, "leaves")
    assert deployment.serves("leaves", EMBEDDING_RECIPE.name)
    before = deployment.resident()
    assert before > 0
    shutil.rmtree(folder)
    assert eventually(lambda: deployment.status("leaves") == 404)
    assert "leaves" not in deployment.models()
    assert eventually(lambda: deployment.resident() == before - 1)
    deployment.put(NAMES[1], "leaves")
    assert deployment.serves("leaves", NAMES[1])


def test_a_bad_folder_is_refused_with_all_problems_until_it_is_good(
    deployment: Deployment,
) -> None:
    folder = deployment.put(NAMES[0], "bad")
    path = folder / "adapter_config.json"
    good = path.read_text()
    config = json.loads(good)
    path.write_text(json.dumps(config | {"r": 4 * config["r"], "use_dora": True}))
    for _ in range(2):
        response = completions.ask(deployment.server, "bad", deployment.case(NAMES[0]))
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        codes = {problem["code"] for problem in error["problems"]}
        assert {"rank-not-as-configured", "unsupported-feature"} <= codes
        assert "use_dora" in error["message"]
        assert str(deployment.directory) not in response.text
    row = deployment.row("bad")
    assert row["state"] == "failed"
    assert "use_dora" in row["last_error"]
    path.write_text(good)
    assert deployment.serves("bad", NAMES[0])
    assert deployment.row("bad")["last_error"] is None


@pytest.mark.parametrize(
    "name", ["../leaves", "/etc", ".", "..", ".hidden", "customer-000/", "way-out", "a\0b"]
)
def test_no_name_leads_out_of_the_directory(
    deployment: Deployment, tmp_path: Path, name: str
) -> None:
    outside = shutil.copytree(deployment.scenario.adapters[NAMES[0]], tmp_path / "outside")
    link = deployment.directory / "way-out"
    link.unlink(missing_ok=True)
    link.symlink_to(outside)
    shutil.copytree(outside, deployment.directory / ".hidden", dirs_exist_ok=True)
    assert deployment.status(name) == 404


def test_a_file_from_outside_is_forbidden(deployment: Deployment, tmp_path: Path) -> None:
    outside = shutil.copytree(deployment.scenario.adapters[NAMES[0]], tmp_path / "outside")
    folder = deployment.directory / "borrowed"
    folder.mkdir()
    for file in outside.iterdir():
        (folder / file.name).symlink_to(file)
    assert deployment.status("borrowed") == 403


def test_the_example_of_an_adapter_per_customer(deployment: Deployment) -> None:
    answers = run_example(
        "per_customer.py",
        *("--url", deployment.server.url, "--prompt", "t1 t2 t3", "--max-tokens", "4"),
        *("--customer", "customer-007", "--customer", "customer-008"),
    )
    assert [line.partition(":")[0] for line in answers] == ["customer-007", "customer-008"]
    assert all(line.partition(": ")[2].lstrip().startswith("t") for line in answers)


def test_the_example_of_an_offline_batch(llama: Scenario, tmp_path: Path) -> None:
    requests = [
        {"prompt": "t1 t2 t3", "adapter": NAMES[0]},
        {"prompt": "t1 t2 t3"},
        {"prompt": "t1 t2 t3", "adapter": "nobody"},
        {"prompt": "t4 t5", "adapter": NAMES[3]},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    run_example(
        "offline_batch.py",
        *("--model", str(llama.base), "--adapters", str(llama.adapters[NAMES[0]].parent)),
        *("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")),
        *("--max-tokens", "4", "--dtype", "float32"),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process, which imports vLLM once
    )
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    pairs = zip(answers, requests, strict=True)
    assert all(answer.items() >= request.items() for answer, request in pairs)
    assert [sorted(answer.keys() & {"text", "error"}) for answer in answers] == [
        ["text"],
        ["text"],
        ["error"],
        ["text"],
    ]
    assert answers[0]["text"] != answers[1]["text"]
    assert "nobody" in answers[2]["error"]


def run_example(script: str, *arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "patterns" / script), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
