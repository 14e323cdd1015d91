"""`vllm-multilora adapters sync` with servers that fail, forget, or are none of the kind."""

import json
import threading
import time
from pathlib import Path

import pytest

from vllm_multilora.cli import main
from vllm_multilora.toolbox.commands import adapters

from .conftest import Site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter = tmp_path / "adapters" / "acme"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.safetensors").write_text("")
    return adapter.parent


class Worker:
    """One of Dynamo's, as far as its answers go.

    Args:
        site: Where it answers.
        swaps: Whether it takes changed files.
    """

    def __init__(self, site: Site, *, swaps: bool = True) -> None:
        self.swaps = swaps
        self.refusal: str | None = None
        self.loras: dict[str, int] = {}
        self.loads: list[str] = []
        site.answers["/v1/loras"] = lambda *_: (200, json.dumps({"loras": self.loras}))
        site.posts["/v1/loras"] = self._load

    def _load(self, body: dict[str, object]) -> tuple[int, str]:
        name = str(body["lora_name"])
        self.loads.append(name)
        if self.refusal is not None:
            return 500, json.dumps({"status": "error", "message": self.refusal})
        was_there = name in self.loras
        self.loras[name] = 1
        return 200, json.dumps({"status": "success", "hot_swap": was_there and self.swaps})


def sync(folder: Path, *urls: str) -> int:
    return main(["adapters", "sync", str(folder), "--workers", *urls])


def test_a_server_that_loads_nothing_is_named_and_the_others_are_served(
    site: Site, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker(site)
    nobody = "http://127.0.0.1:1"
    assert sync(folder, nobody, site.url) == 1
    assert worker.loads == ["acme"]
    assert f"{nobody}/v1/loras cannot be reached: Connection refused" in capsys.readouterr().err


def test_a_server_of_another_kind_is_refused_with_what_was_expected(
    site: Site, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync(folder, site.url) == 1
    assert "loads no adapters: expected a vLLM server" in capsys.readouterr().err


class Loop:
    """The command with `--every`, look by look.

    Args:
        folder: As the command's.
        urls: As the command's.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *urls: str) -> None:
        self._looked, self._next = threading.Semaphore(0), threading.Semaphore(0)
        self._is_over = False
        self.status: int | None = None
        monkeypatch.setattr(adapters, "time", self)
        self._arguments = ["adapters", "sync", str(folder), "--workers", *urls, "--every", "1"]
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._looked.acquire(timeout=10)

    monotonic = staticmethod(time.monotonic)

    def _run(self) -> None:
        self.status = main(self._arguments)

    def sleep(self, seconds: float) -> None:
        self._looked.release()
        assert self._next.acquire(timeout=10)
        if self._is_over:
            raise KeyboardInterrupt

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self._next.release()
            assert self._looked.acquire(timeout=10)

    def end(self) -> int | None:
        self._is_over = True
        self._next.release()
        self._thread.join(10)
        return self.status


def test_a_worker_that_was_started_again_gets_its_adapters_back(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(site)
    loop = Loop(monkeypatch, folder, site.url)
    loop.look(3)
    assert worker.loads == ["acme"]
    worker.loras.clear()
    loop.look()
    assert worker.loads == ["acme", "acme"]
    assert loop.end() == 0


@pytest.mark.parametrize("swaps", [True, False])
def test_changed_files_are_loaded_once_or_said_to_be_kept(
    site: Site,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    swaps: bool,
) -> None:
    worker = Worker(site, swaps=swaps)
    loop = Loop(monkeypatch, folder, site.url)
    (folder / "acme" / "adapter_model.safetensors").write_text("other")
    loop.look(4)  # it has to have come to rest
    assert worker.loads == ["acme", "acme"]
    assert loop.end() == (0 if swaps else 1)
    assert capsys.readouterr().err.count("keeps the version that it has") == (not swaps)


def test_a_refusal_is_said_once_and_asked_for_again_when_the_files_change(
    site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker(site)
    worker.refusal = "contains NaN"
    loop = Loop(monkeypatch, folder, site.url)
    loop.look(3)
    assert worker.loads == ["acme"]
    worker.refusal = None
    (folder / "acme" / "adapter_model.safetensors").write_text("other")
    loop.look(3)
    assert worker.loads == ["acme", "acme"]
    assert loop.end() == 0
    assert capsys.readouterr().err.count("refused") == 1
