"""The server that all clients ask: adapters, tenants, and PEFT's answers."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.serving.bases.test_classification import text
from tests.serving.models.cases import NEW_TOKENS, Case, Scenario
from tests.serving.models.recipes import LINEAR_RECIPES
from tests.serving.server import VllmServer
from vllm_multilora.tenants.keys import stored

BASE, BROKEN, LATE = "base", "broken", "late"
MEDICAL, LEGAL = "medical", "legal"
SOURCES = {MEDICAL: LINEAR_RECIPES[0].name, LEGAL: LINEAR_RECIPES[3].name}
FILLERS = ("filler-1", "filler-2", "filler-3", "filler-4")
ALL_SOURCES = {
    **SOURCES,
    LATE: LINEAR_RECIPES[1].name,
    **{name: recipe.name for name, recipe in zip(FILLERS, LINEAR_RECIPES[4:], strict=True)},
}
"""The recipes of all adapters; no two are equal, since equal ones are in memory once."""
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
LENGTH = 23
"""Tokens of a prompt."""
ADMIN_KEY = "admin-key-of-the-clients-tests"
ACME_KEY = "acme-key-of-the-clients-tests"
LONG_ANSWER = 100
"""Tokens of an answer that, with its prompt, are more than a hasty tenant has for a minute."""
TOKENS_PER_MINUTE = 112
"""After a long answer, a hasty tenant waits six seconds: enough for a client's next call."""
MODEL_LENGTH = 128


@dataclass(frozen=True)
class Site:
    """A running server.

    Attributes:
        server: The server; its own requests are the operator's.
        scenario: Checkpoints and PEFT's answers.
        root: The folder that adapters may be registered from.
    """

    server: VllmServer
    scenario: Scenario
    root: Path

    @property
    def url(self) -> str:
        return self.server.url

    def case(self, model: str) -> Case:
        cases = self.scenario.cases_of(ALL_SOURCES.get(model))
        return next(case for case in cases if len(case.prompt) == LENGTH)

    def prompt(self, model: str) -> str:
        return text(self.case(model).prompt)

    def expected(self, model: str) -> str:
        """What PEFT answers to the model's prompt; the tokenizer puts a space before each word."""
        return " " + text(self.case(model).expected.tokens)

    def task(self, **more: Any) -> dict[str, Any]:
        """What scripts are told: where the server is, whom to ask, and with which key."""
        models = (BASE, *SOURCES)
        return {
            "url": self.url,
            "key": ACME_KEY,
            "admin_key": ADMIN_KEY,
            "prompts": {model: self.prompt(model) for model in models},
            "max_tokens": NEW_TOKENS,
            "long_answer": LONG_ANSWER,
            "broken": BROKEN,
            "late": LATE,
            **more,
        }

    def put(self, source: str, folder: str) -> Path:
        """The files of an adapter, in a folder that adapters may be registered from."""
        target = self.root / folder
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.scenario.adapters[ALL_SOURCES[source]], target))

    def register(self, name: str, path: Path) -> None:
        body = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
        response = self.server.post("/v1/load_lora_adapter", body)
        assert response.status_code == 200, response.text

    def answer(self, model: str) -> str:
        body = {"model": model, "prompt": self.prompt(model), "max_tokens": NEW_TOKENS}
        response = self.server.post("/v1/completions", {**body, "temperature": 0})
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    @contextmanager
    def failing_storage(self) -> Iterator[threading.Event]:
        """`late` is registered, but its files cannot be read until a request has failed for it.

        Yields what is set once they can be read again.
        """
        folder = self.put(LATE, LATE)
        self.register(LATE, folder)
        for other in 2 * FILLERS:  # they take both slots and all of the host memory
            self.answer(other)
        assert self.state(LATE) == "absent"
        config, hidden = folder / "adapter_config.json", folder / "hidden"
        config.rename(hidden)
        config.symlink_to(config.name)  # a loop: the system refuses to follow it
        mended, over = threading.Event(), threading.Event()

        def mend() -> None:
            while not over.wait(0.1):
                if self.state(LATE) == "failed":
                    config.unlink()
                    hidden.rename(config)
                    mended.set()
                    return

        thread = threading.Thread(target=mend)
        thread.start()
        try:
            yield mended
        finally:
            over.set()
            thread.join()
            self.server.post("/v1/unload_lora_adapter", {"lora_name": LATE})

    def state(self, name: str) -> str:
        rows = self.server.get("/v1/lora_adapters").json()["data"]
        return next((str(row["state"]) for row in rows if row["id"] == name), "")


@contextmanager
def running_site(scenario: Scenario, root: Path, hasty: tuple[str, ...] = ()) -> Iterator[Site]:
    """Starts the server.

    Args:
        scenario: Checkpoints and PEFT's answers.
        root: An empty folder.
        hasty: Tenants that may ask for few tokens a minute; their names are their keys, too.
    """
    directory = root / "directory"
    for model in (*SOURCES, *FILLERS):
        shutil.copytree(scenario.adapters[ALL_SOURCES[model]], directory / model)
    spoil(Path(shutil.copytree(scenario.adapters[SOURCES[LEGAL]], directory / BROKEN)))
    tenants = root / "tenants.json"
    few = {"tokens_per_minute": TOKENS_PER_MINUTE}
    tenants.write_text(
        json.dumps(
            {
                "tenants": {
                    "acme": {
                        "keys": [stored(ACME_KEY)],
                        "adapters": [*SOURCES, BROKEN, LATE],
                        "base_model": True,
                    },
                    **{
                        name: {"keys": [stored(name)], "adapters": [MEDICAL], "limits": few}
                        for name in hasty
                    },
                }
            }
        )
    )
    with VllmServer(
        scenario.base,
        *_arguments(root, directory),
        *("--multilora-tenants", str(tenants)),
        log=root / "vllm.log",
        api_key=ADMIN_KEY,
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "MULTILORA_ADMIN_KEY": ADMIN_KEY},
    ) as server:
        yield Site(server, scenario, root)


@contextmanager
def running_open_site(scenario: Scenario, root: Path) -> Iterator[Site]:
    """Starts a server without keys, as trainers and routers expect one; `resolved` is searched."""
    directory, resolved = root / "directory", root / "resolved"
    for model in SOURCES:
        shutil.copytree(scenario.adapters[ALL_SOURCES[model]], directory / model)
    resolved.mkdir()
    with VllmServer(
        scenario.base,
        *_arguments(root, directory),
        log=root / "vllm.log",
        env={
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(resolved),
            "VLLM_SERVER_DEV_MODE": "1",
        },
    ) as server:
        yield Site(server, scenario, root)


def _arguments(root: Path, directory: Path) -> tuple[str, ...]:
    return (
        *("--served-model-name", BASE, "--chat-template", CHAT, "--enable-request-id-headers"),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", str(MODEL_LENGTH), "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "64"),
        *("--multilora-adapter-dir", str(directory), "--multilora-allowed-roots", str(root)),
    )


def spoil(folder: Path) -> None:
    """Puts a NaN among an adapter's weights."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(each for each in sorted(tensors) if "lora_B" in each)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
