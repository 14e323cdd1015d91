"""A server with an API key, an operator's key, and tenants that must not meet."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.serving.models.cases import Scenario
from tests.serving.server import VllmServer
from vllm_multilora.tenants.keys import stored

BASE = "base"
KEYS = {
    "nobody": None,
    "wrong": "sk-wrong-wrong-wrong",
    "admin": "sk-admin-admin-admin",
    "client": "sk-client-client-client",
    "acme": "sk-acme",
    "zen": "sk-zen",
    "plain": "sk-plain",
    "narrow": "sk-narrow",
    "thrifty": "sk-thrifty",
    "picky": "sk-picky",
    "texts": "sk-texts",
    "trusted": "sk-trusted",
}
ADAPTERS = {
    "acme-a": "all-linear-r8",
    "acme-b": "qv-r5",
    "zen-a": "rslora-r16",
    "shared": "all-linear-r8",
}
"""What is served, and which of the scenario's adapters it is."""

TENANTS: dict[str, Any] = {
    "acme": {
        "adapters": ["acme-*", "shared"],
        "routes": ["acme-route"],
        "weight": 2,
        "allow": ["grammars"],
    },
    "zen": {"adapters": ["zen-a", "shared"]},
    "plain": {"base_model": True},
    "narrow": {"adapters": ["shared"], "limits": {"running": 1, "waiting": 1}},
    "thrifty": {"adapters": ["shared"], "limits": {"tokens_per_minute": 60}},
    "picky": {
        "adapters": ["acme-*", "zen-a"],
        "limits": {"adapters": 1},
    },
    "texts": {"adapters": ["shared"]},
    "trusted": {"adapters": ["shared"], "allow": ["media", "grammars"]},
}
ROUTES = {"routes": {"acme-route": "acme-b", "zen-route": "zen-a", "base-route": BASE}}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] | trim }} {% endfor %}"


@dataclass(frozen=True)
class TenantServer:
    """The running server.

    Attributes:
        server: Requests made with it have no key.
        scenario: Whose adapters are served.
        tenants: The tenants file.
        directory: The adapter directory.
        roots: Folders that only operators may be told.
    """

    server: VllmServer
    scenario: Scenario
    tenants: Path
    directory: Path
    roots: tuple[Path, ...]

    def request(
        self, who: str, method: str, path: str, json: Any = None, **headers: str
    ) -> httpx.Response:
        """Sends one request over a connection of its own."""
        key = KEYS.get(who, who)
        sent = {**headers, **({"authorization": f"Bearer {key}"} if key else {})}
        with httpx.Client(base_url=self.server.url, trust_env=False, timeout=120) as client:
            return client.request(method, path, json=json, headers=sent)

    def complete(self, who: str, model: str, prompt: Any, **options: Any) -> httpx.Response:
        body = {"model": model, "prompt": list(prompt), "max_tokens": 2, "temperature": 0}
        return self.request(who, "POST", "/v1/completions", {**body, **options})

    @contextmanager
    def half_sent(self, who: str, model: str) -> Iterator["HalfSent"]:
        """A request whose body has not come yet; entered when the server asks for it.

        Raises:
            AssertionError: The server answers at once instead.
        """
        body = json.dumps({"model": model, "prompt": [7, 8], "max_tokens": 1}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEYS[who]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"Connection: close\r\nExpect: 100-continue\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self.server.port), timeout=120) as connection:
            connection.sendall(head.encode())
            answer = connection.recv(4096)
            assert b" 100 " in answer.splitlines()[0], answer
            yield HalfSent(connection, body)


@dataclass(frozen=True)
class HalfSent:
    """A request of which the server has the head."""

    connection: socket.socket
    body: bytes

    def finish(self) -> bytes:
        """Sends the body, and returns the answer's first line."""
        self.connection.sendall(self.body)
        return self.connection.recv(4096).splitlines()[0]


def write_tenants(path: Path, tenants: dict[str, Any]) -> None:
    """Writes a tenants file with the keys of this module; by renaming, as one should."""
    data = {name: {"keys": [stored(KEYS[name] or "")], **t} for name, t in tenants.items()}
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"tenants": data}))
    new.rename(path)


@contextmanager
def tenant_server(scenario: Scenario, folder: Path, *args: str) -> Iterator[TenantServer]:
    """Starts the server.

    Args:
        scenario: A tiny Llama with its adapters.
        folder: For the server's files.
        *args: Further arguments of ``vllm serve``.
    """
    tenants, admin = folder / "tenants.yaml", folder / "admin-key"
    write_tenants(tenants, TENANTS)
    admin.write_text(f"{KEYS['admin']}\n")
    (folder / "routes.json").write_text(json.dumps(ROUTES))
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    directory = folder / "directory"
    broken = directory / "acme-broken"
    broken.mkdir(parents=True)
    (broken / "adapter_config.json").write_text("{")
    (broken / "adapter_model.safetensors").write_bytes(b"")
    roots = (next(iter(scenario.adapters.values())).parent, directory)
    modules = [
        json.dumps({"name": name, "path": str(scenario.adapters[adapter])})
        for name, adapter in ADAPTERS.items()
    ]
    with VllmServer(
        scenario.base,
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
        *("--max-model-len", "128", "--max-num-seqs", "8", "--block-size", "32"),
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "6", "--max-lora-rank", "64"),
        *("--lora-modules", *modules, "--chat-template", str(folder / "chat.jinja")),
        *("--enable-prompt-tokens-details", "--enable-scale-out"),
        *("--multilora-routes", str(folder / "routes.json")),
        *("--multilora-adapter-dir", str(directory), "--multilora-allowed-roots", str(roots[0])),
        *("--multilora-admin-key-file", str(admin), "--multilora-tenants", str(tenants)),
        *args,
        log=folder / "vllm.log",
        env={
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_ENABLE_RESPONSES_API_STORE": "1",
            "VLLM_API_KEY": KEYS["client"] or "",
        },
    ) as server:
        yield TenantServer(server, scenario, tenants, directory, roots)
