"""An adapter that cannot be had fails its own requests, with the reason, and nobody else's."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import httpx
import pytest

from .. import completions, failed_answers
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer

pytestmark = pytest.mark.serving

BASE, VICTIM = "base", "victim"
NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES)
SOURCE = NAMES[0]
LENGTH = 23
RECOVERY_LIMIT_S = 20.0
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@dataclass(frozen=True)
class Deployment:
    """A running server, its good adapters, and one whose files the tests break and mend."""

    server: VllmServer
    scenario: Scenario
    victim: Path

    def case(self, name: str | None) -> Case:
        return next(c for c in self.scenario.cases_of(name) if len(c.prompt) == LENGTH)

    def ask(self, model: str, case: Case, **options: object) -> httpx.Response:
        return completions.ask(self.server, model, case, **options)

    def assert_serves(self, model: str, case: Case) -> None:
        completions.assert_serves(self.server, model, case)

    def evict_victim(self) -> None:
        """More other adapters than the server's host memory holds."""
        for name in NAMES[1:5]:
            self.assert_serves(name, self.case(name))

    def mend(self) -> None:
        """Puts the files back, and waits until the adapter has recovered by itself."""
        shutil.rmtree(self.victim, ignore_errors=True)
        shutil.copytree(self.scenario.adapters[SOURCE], self.victim)
        case, deadline = self.case(SOURCE), time.monotonic() + RECOVERY_LIMIT_S
        while self.ask(VICTIM, case).status_code != 200:
            assert time.monotonic() < deadline, self.server.log_tail()
            time.sleep(0.5)
        self.assert_serves(VICTIM, case)


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("broken")
    victim = folder / VICTIM
    shutil.copytree(llama.adapters[SOURCE], victim)
    adapters = {**{name: llama.adapters[name] for name in NAMES}, VICTIM: victim}
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--no-enable-prefix-caching"),
        *("--max-model-len", "128", "--max-num-seqs", "16", "--chat-template", CHAT),
        *failed_answers.ARGUMENTS,
        *("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "3", "--max-lora-rank", "64"),
        *("--lora-modules", *(f"{name}={path}" for name, path in adapters.items())),
        log=folder / "vllm.log",
    ) as server:
        yield Deployment(server, llama, victim)


def tensor_file(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_tensors(folder: Path) -> None:
    tensor_file(folder).unlink()


def truncate(folder: Path) -> None:
    whole = tensor_file(folder).read_bytes()
    tensor_file(folder).write_bytes(whole[: len(whole) // 2])


def write_garbage(folder: Path) -> None:
    tensor_file(folder).write_bytes(b"not a checkpoint " * 100)


def break_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("break_files", "status", "words"),
    [
        pytest.param(remove_folder, 404, VICTIM, id="folder-gone"),
        pytest.param(truncate, 400, "adapter_model.safetensors", id="truncated"),
        pytest.param(break_config, 400, "adapter_config.json", id="config-broken"),
    ],
)
def test_broken_files_fail_their_own_requests_until_they_are_mended(
    deployment: Deployment, break_files: Callable[[Path], None], status: int, words: str
) -> None:
    deployment.mend()
    deployment.evict_victim()
    break_files(deployment.victim)
    others = [*NAMES, None]
    with ThreadPoolExecutor(2 * len(others)) as pool:
        # Twice the others around the victim, whose requests come from several clients.
        served = [
            pool.submit(deployment.assert_serves, name or BASE, deployment.case(name))
            for name in (*others, *others)
        ]
        refused = [pool.submit(deployment.ask, VICTIM, deployment.case(SOURCE)) for _ in range(3)]
        for future in served:
            future.result()
    for future in refused:
        response = future.result()
        assert response.status_code == status, f"{response.text}\n{deployment.server.log_tail()}"
        error = response.json()["error"]
        assert error["code"] == status
        assert VICTIM in error["message"]
        assert words in error["message"]
    assert deployment.server.get("/health").status_code == 200
    deployment.mend()


@pytest.mark.smoke("chat completions, responses and messages")
@pytest.mark.parametrize(
    ("break_files", "status"),
    [
        pytest.param(remove_tensors, HTTPStatus.NOT_FOUND, id="gone"),
        pytest.param(write_garbage, HTTPStatus.BAD_REQUEST, id="bad"),
    ],
)
def test_every_endpoint_tells_the_reason(
    deployment: Deployment, break_files: Callable[[Path], None], status: HTTPStatus
) -> None:
    deployment.mend()
    deployment.evict_victim()
    break_files(deployment.victim)
    for call in failed_answers.CALLS:
        failed_answers.assert_fails(
            deployment.server, call, VICTIM, status, "adapter_model.safetensors"
        )
    for name in (*NAMES, None):
        deployment.assert_serves(name or BASE, deployment.case(name))
