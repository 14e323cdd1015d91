"""What an API server does with URLs of adapter directories: names, and looks at other versions."""

import asyncio
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.api_server import registered_versions
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.names.sources import source_names
from vllm_multilora.integration.server.names.sources.source_names import (
    CHECK_S,
    SourceNames,
    SourceResolver,
)
from vllm_multilora.sources.source_settings import require_sources

URL = "s3://loras/served"


@pytest.mark.parametrize(
    ("below", "name", "path"),
    [
        (URL, "a", f"{URL}/a"),
        (f"{URL}/", "a", f"{URL}/a"),
        ("https://host/loras", "a b", "https://host/loras/a b"),
        ("hf://owner", "repository", "hf://owner/repository"),
        ("hf://owner/repository@v1", "a", "hf://owner/repository@v1/a"),
        (URL, "a/b", None),
        (URL, "..", None),
        (URL, ".a", None),
        (URL, "", None),
        (URL, "a?versionId=1", None),
        ("https://host/loras", "%61", None),
        ("hf://owner", "repository@v1", None),
    ],
)
def test_a_name_leads_to_one_url_and_no_other_name_does(below, name, path):
    assert SourceResolver(below).path_of(name) == path


@pytest.mark.parametrize("allowed", [(), ("s3://loras/other",), ("/adapters",)])
def test_urls_of_directories_must_be_allowed(allowed):
    settings = MultiLoRAConfig(allowed_roots=allowed, adapter_dir=(URL, "/adapters"))
    expected = f"--multilora-adapter-dir: {URL} is outside the sources that adapters may come from"
    with pytest.raises(ConfigError, match=expected):
        require_sources(settings)
    assert settings.directories == ("/adapters",)


class Engine:
    """An engine that has one version after the other at a URL.

    Attributes:
        digest: What is at the URL; an error's status code instead: why it is not served.
        hangs: Whether reading has no end.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.digest: str | int = "first"
        self.hangs = False
        self.admitted: list[int] = []
        self.removed: list[int] = []
        numbers = itertools.count(2)
        lora = LoRARequest("a", 1, f"{URL}/a")
        other = LoRARequest("elsewhere", 1000, f"{URL}/b")
        self.models = SimpleNamespace(
            engine_client=SimpleNamespace(),
            lora_requests={"a": lora, "elsewhere": other},
            lora_id_counter=SimpleNamespace(inc=lambda _: next(numbers)),
        )
        self._note(lora, "first")
        self.names = SourceNames(self.models, [SourceResolver(URL)])
        monkeypatch.setattr(source_names, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(registration, "admit", self._admit)
        monkeypatch.setattr(registration, "remove", self._remove)
        monkeypatch.setattr(registration, "remove_later", self._remove)

    @property
    def served(self) -> int | None:
        """The number of the version that serves."""
        lora = self.models.lora_requests.get("a")
        return lora and lora.lora_int_id

    def _note(self, lora: LoRARequest, digest: str) -> None:
        version = registered_versions.Version(digest, 0.0, "lora")
        registered_versions.note(self.models.engine_client, lora.lora_int_id, version)

    async def _admit(self, models: Any, lora: LoRARequest, param: str) -> Any:
        self.admitted.append(lora.lora_int_id)
        if self.hangs:
            await asyncio.Event().wait()
        if isinstance(self.digest, int):
            return SimpleNamespace(error=SimpleNamespace(code=self.digest, message="no"))
        self._note(lora, self.digest)
        return None

    async def _remove(self, models: Any, lora: LoRARequest, delay_s: float = 0.0) -> None:
        self.removed.append(lora.lora_int_id)

    async def use(self, after_s: float, name: str = "a") -> None:
        """A request that comes so many seconds after the one before, and whatever it begins."""
        self.now += after_s
        await self.names.look_again(name)
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def test_what_is_used_is_looked_at_from_time_to_time(engine: Engine) -> None:
    async def run() -> None:
        for after_s in (0, 1, CHECK_S - 2):
            await engine.use(after_s)
        assert engine.admitted == []
        await engine.use(1)
        await engine.use(1)
        assert engine.admitted == engine.removed == [2]
        await engine.use(CHECK_S)
        assert engine.admitted == engine.removed == [2, 3]
        assert engine.served == 1

    asyncio.run(run())


def test_another_version_serves_from_then_on(engine: Engine) -> None:
    async def run() -> None:
        await engine.use(0)
        engine.digest = "second"
        await engine.use(CHECK_S)
        assert engine.served == 2
        assert engine.removed == [1]

    asyncio.run(run())


def test_what_has_gone_is_unloaded_and_what_is_refused_changes_nothing(engine: Engine) -> None:
    async def run() -> None:
        await engine.use(0)
        for engine.digest in (400, 403, 500, 503):
            await engine.use(CHECK_S)
            assert engine.served == 1
        assert 1 not in engine.removed
        engine.digest = 404
        await engine.use(CHECK_S)
        assert engine.served is None
        assert 1 in engine.removed

    asyncio.run(run())


def test_the_first_request_for_long_waits_for_the_look_but_not_for_a_source_that_hangs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_names, "_WAIT_S", 0.05)

    async def run() -> None:
        await engine.use(0)
        engine.digest = "second"
        engine.now += 2 * CHECK_S
        await engine.names.look_again("a")
        assert engine.served == 2
        engine.hangs = True
        engine.now += 2 * CHECK_S
        await engine.names.look_again("a")
        assert engine.served == 2
        await engine.use(CHECK_S)
        assert engine.admitted == [2, 3]  # which still goes on

    asyncio.run(run())


def test_what_was_registered_from_elsewhere_is_not_looked_at(engine: Engine) -> None:
    async def run() -> None:
        for name in ("elsewhere", "unknown"):
            await engine.use(0, name)
            await engine.use(CHECK_S, name)
        assert engine.admitted == []

    asyncio.run(run())
