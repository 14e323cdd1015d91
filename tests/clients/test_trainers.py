"""Trainers and orchestrators that put adapters into a running server.

TRL's own client runs. SkyRL's and AIBrix' packages need far more than their calls, so these are
replayed: the same requests, in the same order, with the same files.
"""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.clients.programs import TRL, Program, each_of
from tests.clients.site import FILLERS, LATE, LEGAL, MODEL_LENGTH, Site, spoil

pytestmark = [pytest.mark.serving, pytest.mark.clients]

SIDECAR_LIMIT_S = 30.0


def served(site: Site, name: str) -> bool:
    return name in [each["id"] for each in site.server.get("/v1/models").json()["data"]]


def answer(site: Site, name: str, prompt_of: str) -> str:
    body = {"model": name, "prompt": site.prompt(prompt_of), "max_tokens": 12, "temperature": 0}
    response = site.server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


@each_of(TRL)
@pytest.mark.proves("`/server_info`, `/pause`, `/resume`: reads limits, and that engines are one")
def test_trl_reads_what_it_needs_before_its_first_step(open_site: Site, client: Program) -> None:
    assert client.run("start", open_site.task()) == {
        "max_model_len": MODEL_LENGTH,
        "dtype": "torch.float32",
        "max_lora_rank": 64,
        "max_loras": 2,
        "engines": 1,
        "world": 1,
    }


@each_of(TRL)
@pytest.mark.proves(
    "new policies under new names while requests run; old ones go, then their folders"
)
def test_trl_serves_each_policy_while_requests_run(open_site: Site, client: Program) -> None:
    over, answers = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            answers.append(open_site.answer(LEGAL))

    background = threading.Thread(target=ask)
    background.start()
    try:
        folders: list[Path] = []
        for number, policy in enumerate(FILLERS[:3]):
            folders.append(open_site.put(policy, f"policy-{number}"))
            old = f"policy-{number - 1}" if number else ""
            task = open_site.task(name=f"policy-{number}", folder=str(folders[-1]), old=old)
            client.run("step", task)
            if number:
                shutil.rmtree(folders[number - 1])
            assert answer(open_site, f"policy-{number}", policy) == open_site.expected(policy)
            assert not old or not served(open_site, old)
    finally:
        over.set()
        background.join()
    assert len(answers) > 1
    assert set(answers) == {open_site.expected(LEGAL)}


@each_of(TRL)
@pytest.mark.proves("a policy with NaN is refused with the reason")
def test_trl_reads_why_a_policy_is_refused(open_site: Site, client: Program) -> None:
    folder = open_site.put(LEGAL, "broken-policy")
    spoil(folder)
    said = client.run("refused", open_site.task(name="broken-policy", folder=str(folder)))
    assert "400" in said["message"]
    assert "NaN" in said["message"]
    assert not served(open_site, "broken-policy")


@pytest.mark.proves("a checkpoint renamed into the resolver's folder answers, with `logprobs`")
def test_skyrls_external_engine_is_asked_by_the_checkpoints_name(
    open_site: Site, tried: Callable[[str, str], None]
) -> None:
    tried("SkyRL's Tinker server (external engine, replay)", "0.4.0")
    policy, name = FILLERS[0], "model_0123_step-4"
    open_site.put(policy, "unpacked").rename(open_site.root / "resolved" / name)
    case = open_site.case(policy)
    body = {
        "model": name,
        "prompt": list(case.prompt),
        "n": 1,
        "seed": 0,
        "max_tokens": len(case.expected.tokens),
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "logprobs": True,
        "stream": False,
        "return_token_ids": True,
    }
    response = httpx.post(
        f"{open_site.url}/v1/completions",
        json=body,
        headers={"X-Session-ID": "1:0", "Authorization": "Bearer EMPTY"},
        timeout=60,
        trust_env=False,
    )
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [tuple(each["token_ids"]) for each in choices] == [case.expected.tokens]
    for each in choices:
        assert each["finish_reason"] == "length"
        assert each["logprobs"]["token_logprobs"] == pytest.approx(case.expected.logprobs, abs=1e-3)


class Sidecar:
    """AIBrix' runtime beside a server: what it does for `/v1/lora_adapter/load` and `/unload`."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def download(self, source: str, name: str) -> Path:
        """Fetches an object, unless its marker is there; leaves what a fetch in parts leaves."""
        folder = self.site.root / "aibrix" / name
        marker = folder / ".aibrix_download_complete"
        if not marker.exists():
            self.site.put(source, f"aibrix/{name}")
            (folder / "adapter_model.safetensors.part").write_bytes(b"half of it")
            (folder / "adapter_model.safetensors.part.etag").write_text("0123")
            marker.touch()
        return folder

    def load(self, name: str, folder: Path) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(folder)}
        return self._post("/v1/load_lora_adapter", body)

    def unload(self, name: str) -> httpx.Response:
        return self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def _post(self, path: str, body: dict[str, str]) -> httpx.Response:
        url = f"{self.site.url}{path}"
        return httpx.post(url, json=body, timeout=SIDECAR_LIMIT_S, trust_env=False)


@pytest.mark.proves("loads, unloads and is refused; `.part` files and its marker do not matter")
def test_aibrix_loads_and_unloads_what_it_has_downloaded(
    open_site: Site, tried: Callable[[str, str], None]
) -> None:
    tried("AIBrix' sidecar (replay)", "0.8.0")
    sidecar, name = Sidecar(open_site), "of-aibrix"
    folder = sidecar.download(LATE, name)
    assert sidecar.load(name, folder).status_code == 200
    assert answer(open_site, name, LATE) == open_site.expected(LATE)
    again = sidecar.load(name, folder)
    assert again.status_code == 400
    assert "already" in again.text
    assert sidecar.load("gone", folder.parent / "gone").status_code == 404
    assert sidecar.unload(name).status_code == 200
    assert not served(open_site, name)
    assert sidecar.unload(name).status_code == 404


@pytest.mark.proves("a stale object serves its own weights under a version that says so")
def test_a_stale_object_of_aibrix_is_seen_in_the_version(
    open_site: Site, tried: Callable[[str, str], None]
) -> None:
    """The object has changed, and its marker keeps AIBrix from fetching it: versions are equal."""
    tried("AIBrix' sidecar (replay)", "0.8.0")
    sidecar, name = Sidecar(open_site), "stale"

    def version() -> str:
        [row] = [
            each for each in open_site.server.get("/v1/models").json()["data"] if each["id"] == name
        ]
        return str(row["digest"])

    digests = []
    for source in (LATE, FILLERS[1]):
        assert sidecar.load(name, sidecar.download(source, name)).status_code == 200
        assert answer(open_site, name, LATE) == open_site.expected(LATE)
        digests.append(version())
        assert sidecar.unload(name).status_code == 200
    assert digests[0] == digests[1]
    shutil.rmtree(open_site.root / "aibrix" / name)  # as `cleanup_local` does
    assert sidecar.load(name, sidecar.download(FILLERS[1], name)).status_code == 200
    assert answer(open_site, name, FILLERS[1]) == open_site.expected(FILLERS[1])
    assert version() != digests[0]
    assert sidecar.unload(name).status_code == 200
