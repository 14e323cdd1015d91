"""Only adapters that somebody has signed who is trusted: over HTTP, in the store's sandbox."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.adapters.signing.signed_folders import KeyPair

from ..completions import body, token_ids
from ..models.cases import Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer

pytestmark = pytest.mark.serving

NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES[:2])


@dataclass(frozen=True)
class Site:
    server: VllmServer
    scenario: Scenario
    root: Path
    ours: KeyPair
    theirs: KeyPair

    def trust(self, *pairs: KeyPair) -> None:
        self.keys.write_bytes(b"".join(pair.public.read_bytes() for pair in pairs))

    @property
    def keys(self) -> Path:
        return self.root / "keys.pem"

    def put(self, name: str, source: str) -> Path:
        return Path(shutil.copytree(self.scenario.adapters[source], self.root / "adapters" / name))

    def load(self, name: str) -> httpx.Response:
        folder = str(self.root / "adapters" / name)
        register = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        return self.server.post("/v1/load_lora_adapter", register)

    def ask(self, name: str, source: str) -> httpx.Response:
        return self.server.post("/v1/completions", body(name, self.scenario.cases_of(source)[-1]))


@pytest.fixture(scope="module")
def site(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("signed")
    (root / "adapters").mkdir()
    ours, theirs = KeyPair.make(root, "ours"), KeyPair.make(root, "theirs")
    shutil.copy(ours.public, root / "keys.pem")
    with VllmServer(
        llama.base,
        *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--max-model-len", "128"),
        *("--enable-lora", "--max-loras", "1", "--max-cpu-loras", "4", "--max-lora-rank", "64"),
        # The keys lie outside: jobs cannot read them any more once they look at an adapter.
        *("--multilora-allowed-roots", str(root / "adapters")),
        *("--multilora-signing-keys", str(root / "keys.pem")),
        log=root / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Site(server, llama, root, ours, theirs)


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def test_a_signed_adapter_serves_and_a_flipped_byte_is_refused(site: Site) -> None:
    folder = site.ours.sign(site.put("signed", NAMES[0]))
    assert site.load("signed").status_code == 200
    tokens = site.scenario.cases_of(NAMES[0])[-1].expected.tokens
    assert token_ids(site.ask("signed", NAMES[0])) == tokens
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    message = refusal(site.load("signed"))
    assert "adapter_model.safetensors has sha256" in message
    assert "as signed" in message
    site.put("unsigned", NAMES[0])
    assert "model.sig is missing, expected a signature that is trusted here, by 1 key" in refusal(
        site.load("unsigned")
    )


def test_whose_key_has_gone_serves_no_more_even_from_memory(site: Site) -> None:
    site.trust(site.ours, site.theirs)
    for name, source, key in (("a", NAMES[0], site.ours), ("b", NAMES[1], site.theirs)):
        key.sign(site.put(name, source))
        assert site.load(name).status_code == 200
        assert site.ask(name, source).status_code == 200  # of one slot, the other is in memory
    assert site.ask("a", NAMES[0]).status_code == 200
    site.trust(site.ours)
    assert "which is not trusted here" in refusal(site.ask("b", NAMES[1]))
    assert site.ask("a", NAMES[0]).status_code == 200
    site.keys.write_text("nothing of use")
    broken = site.ask("b", NAMES[1])
    assert broken.status_code == 503, broken.text
    assert "file of signing keys cannot be used" in broken.json()["error"]["message"]
    (log,) = site.server.store_folder.rglob("store-*.log")
    assert "has no key" in log.read_text()
    site.keys.unlink()
    gone = site.ask("b", NAMES[1])
    assert gone.status_code == 503, gone.text  # the adapter is there
    site.trust(site.ours, site.theirs)
    assert site.ask("b", NAMES[1]).status_code == 200
