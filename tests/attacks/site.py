"""A server with every way in that clients have, and a good customer beside whom all is tried."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.serving import completions
from tests.serving.models.cases import Case, Scenario
from tests.serving.models.recipes import LINEAR_RECIPES
from tests.serving.server import VllmServer

BASE = "base"
GOOD = "good-customer"
NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES)
SOURCE = NAMES[0]
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
MAX_LABELS = 8

ROUTES = """
routes:
  by-language: {by: language, cases: {fr: good-customer, pt-BR: good-customer}, default: base}
  by-user: {by: user, cases: {acme: good-customer}, default: base}
  by-task: {by: "metadata:task", cases: {translate: good-customer}}
  by-header: {by: "header:x-task", cases: {translate: good-customer}, default: base}
  split: {split: {good-customer: 1, base: 1}, sticky: user}
"""

HOSTILE_NAMES = {
    "256": "x" * 256,
    "256-bytes-of-emoji": "🎉" * 64,
    "5000": "x" * 5000,
    "joined-emoji": "👩\u200d🚀",
    "null": "a\0b",
    "newline": "a\nINFO 11-25 00:00:00 forged.py:1] all is well",
    "carriage-return": "a\rb",
    "escape": "\x1b[31mred",
    "escape-of-one-byte": "\x9b31mred",
    "right-to-left": "\u202egnp.exe",
    "lone-surrogate": "\ud800",
    "dots": "../outside/adapter",
    "dots-inside": "resolved/../../outside/adapter",
    "only-dots": "..",
}
"""Names that no adapter may have."""

STRANGE_NAMES = {"emoji": "🎉🔥", "absolute": "/etc", "spaces": "  ", "slashes": "a//b/"}
"""Names that nobody has, although an adapter might."""


@dataclass
class Site:
    """The server and what lies around it.

    Attributes:
        server: The server.
        scenario: Checkpoints and PEFT's answers.
        root: Where adapters may be registered from.
        resolved: The folder of vLLM's filesystem resolver.
        directory: The adapter directory.
        outside: A good adapter in a folder where none may come from.
    """

    server: VllmServer
    scenario: Scenario
    root: Path
    resolved: Path
    directory: Path
    outside: Path

    @property
    def case(self) -> Case:
        return self.scenario.cases_of(SOURCE)[0]

    def post(
        self, path: str, body: Any, headers: Mapping[str, str | bytes] | None = None
    ) -> httpx.Response:
        """POSTs JSON as any client can write it, lone surrogates included."""
        return httpx.post(
            f"{self.server.url}{path}",
            content=json.dumps(body).encode(),
            headers=[(b"content-type", b"application/json"), *_encoded(headers or {})],
            timeout=60,
            trust_env=False,
        )

    def ask(self, model: str, **options: Any) -> httpx.Response:
        return self.post("/v1/completions", completions.body(model, self.case, **options))

    def load(self, name: str, path: Path | str, **options: Any) -> httpx.Response:
        return self.post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **options}
        )

    def unload(self, name: str) -> httpx.Response:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def put(self, source: str, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self.scenario.adapters[source], folder))

    def assert_unharmed(self) -> None:
        """The server is healthy, and the good customer is answered as PEFT answers."""
        assert self.server.get("/health").status_code == 200, self.server.log_tail()
        completions.assert_serves(self.server, GOOD, self.case)


def _encoded(headers: Mapping[str, str | bytes]) -> list[tuple[bytes, bytes]]:
    return [
        (name.encode(), value if isinstance(value, bytes) else value.encode("ascii"))
        for name, value in headers.items()
    ]


@contextmanager
def running_site(llama: Scenario, folder: Path) -> Iterator[Site]:
    """Runs the server in a folder of its own."""
    root, directory = folder / "root", folder / "directory"
    resolved = root / "resolved"
    for each in (root, resolved, directory, folder / "outside"):
        each.mkdir(parents=True)
    outside = Path(shutil.copytree(llama.adapters[SOURCE], folder / "outside" / "adapter"))
    routes = folder / "routes.yaml"
    routes.write_text(ROUTES)
    with VllmServer(
        llama.base,
        *("--served-model-name", BASE, "--chat-template", CHAT),
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--block-size", "32"),
        *("--max-model-len", "128", "--max-num-seqs", "16"),
        *("--enable-lora", "--max-loras", "3", "--max-cpu-loras", "8", "--max-lora-rank", "64"),
        *("--multilora-allowed-roots", str(root)),
        *("--multilora-adapter-dir", str(directory)),
        *("--multilora-routes", str(routes)),
        *("--multilora-metrics-max-adapters", str(MAX_LABELS)),
        *("--lora-modules", f"{GOOD}={_inside(llama, root)}"),
        log=folder / "vllm.log",
        start_timeout=600.0,
        env={
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_PLUGINS": "multilora,lora_filesystem_resolver",
            "VLLM_LORA_RESOLVER_CACHE_DIR": str(resolved),
        },
    ) as server:
        yield Site(server, llama, root, resolved, directory, outside)


def _inside(llama: Scenario, root: Path) -> Path:
    return Path(shutil.copytree(llama.adapters[SOURCE], root / GOOD))
