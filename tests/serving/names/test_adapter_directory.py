"""One API server's table of names follows its adapter directories; the engine is a stand-in."""

import asyncio
import functools
import threading
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from vllm_multilora.adapters.directory import FIRST_NUMBER, AdapterDirectories
from vllm_multilora.adapters.files.allowed_roots import AllowedRoots
from vllm_multilora.adapters.problems import Code, Problem
from vllm_multilora.config import MultiLoRAConfig
from vllm_multilora.failures import FailureKind, LoadFailure
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.server import start
from vllm_multilora.integration.server.names import (
    adapter_directory,
    model_names,
    preload,
    registration,
    routes,
)
from vllm_multilora.integration.server.names.adapter_directory import (
    DIRECTORY,
    SCAN_S,
    DirectoryServer,
)
from vllm_multilora.integration.server.names.public_names import public_names
from vllm_multilora.integration.server.names.refusals import Refusals
from vllm_multilora.integration.server.names.routes import ROUTES
from vllm_multilora.integration.server.names.sources import source_names
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.requests.http_calls import HttpCall
from vllm_multilora.integration.server.requests.metering import METER, ServerMeter
from vllm_multilora.tenants.limits import MAX_FIRST_READINGS, Account
from vllm_multilora.tenants.rules import Role
from vllm_multilora.tenants.tenant import Tenant

pytestmark = pytest.mark.serving

BASE = "base"


class Engine:
    """Reads an adapter as the text of its weights; "bad" and "away" cannot be had."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.read: list[str] = []
        self.engine_core = self
        self.core_engines = ("the only one",)

    async def _call_utility_async(self, *call: Any, engine: str) -> dict[str, Any]:
        [fields] = call[3]
        try:
            await self.add_lora(LoRARequest(**fields))
        except AdapterRefusedError as error:
            return error.as_dict()
        return {}

    async def add_lora(self, lora: LoRARequest) -> bool:
        if lora.lora_int_id in self.held:
            return True
        content = (Path(lora.lora_path) / "adapter_model.safetensors").read_text()
        self.read.append(f"{lora.lora_name}: {content}")
        refuse(content)
        self.held[lora.lora_int_id] = content
        return True

    async def remove_lora_async(self, lora_id: int) -> bool:
        return self.held.pop(lora_id, None) is not None


class TwoEngines(Engine):
    """Data parallelism: the second engine reads an adapter after the first, if it can.

    Attributes:
        fault: What it finds in the place of weights; None: what the first has found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_by_second: dict[int, str] = {}
        self.fault: str | None = None

    async def add_lora(self, lora: LoRARequest) -> bool:
        await super().add_lora(lora)
        if lora.lora_int_id not in self.held_by_second:
            content = self.fault or self.held[lora.lora_int_id]
            refuse(content)
            self.held_by_second[lora.lora_int_id] = content
        return True

    async def remove_lora_async(self, lora_id: int) -> bool:
        self.held_by_second.pop(lora_id, None)
        return await super().remove_lora_async(lora_id)


class SlowEngine(Engine):
    """Reads for as long as the test says, whatever becomes of who has asked."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = asyncio.Event()
        self.may_read = asyncio.Event()
        self.reading: asyncio.Task[bool] | None = None

    async def add_lora(self, lora: LoRARequest) -> bool:
        self.reading = asyncio.create_task(self._read(lora))
        self.is_asked.set()
        return await asyncio.shield(self.reading)

    async def _read(self, lora: LoRARequest) -> bool:
        await self.may_read.wait()
        return await super().add_lora(lora)

    async def read_for_nobody(self, request: asyncio.Task[Any]) -> None:
        """The client of the request that has an adapter read disconnects meanwhile."""
        await asyncio.wait_for(self.is_asked.wait(), 10)
        request.cancel()
        await settle()
        self.may_read.set()
        await asyncio.wait({request}, timeout=10)
        assert request.cancelled()
        assert self.reading is not None
        assert await self.reading
        await settle()


class StrictEngine(Engine):
    """Refuses everything, while there is a reason.

    Attributes:
        codes: Of the problems that there are; None: it may be served.
    """

    codes: tuple[Code, ...] | None = None

    async def add_lora(self, lora: LoRARequest) -> bool:
        if self.codes is None:
            return await super().add_lora(lora)
        problems = [Problem.at(code, "f", "", "", "").as_dict() for code in self.codes]
        failure = LoadFailure(FailureKind.INVALID, "not now")
        raise AdapterRefusedError(lora.lora_int_id, failure, problems)


def refuse(content: str) -> None:
    for text, kind in (("bad", FailureKind.INVALID), ("away", FailureKind.UNREADABLE)):
        if content == text:
            problem = Problem(Code.NOT_FINITE, "f", "", "", "", f"{text} weights")
            failure = LoadFailure(kind, problem.message)
            raise AdapterRefusedError(1, failure, [problem.as_dict()])


class Models:
    """What `DirectoryServer` uses of vLLM's `OpenAIServingModels`."""

    def __init__(self, engine: Engine) -> None:
        self.engine_client = engine
        self.lora_requests: dict[str, LoRARequest] = {}

    def is_base_model(self, name: str) -> bool:
        return name == BASE


class Site:
    """A directory, one engine or two, and API servers over both."""

    def __init__(self, root: Path, servers: int = 1, engine: Engine | None = None) -> None:
        self.root = root
        self.engine = engine or Engine()
        self.models = [Models(self.engine) for _ in range(servers)]
        self.servers = [
            DirectoryServer(
                models,
                AdapterDirectories([str(root)], AllowedRoots((), [root])),
                is_alone=servers == 1,
            )
            for models in self.models
        ]
        self.now = 0.0
        for server in self.servers:
            server._missed = Refusals(lambda: self.now)

    def pass_time(self, seconds: float) -> None:
        """So much later, as far as pauses between tries go."""
        self.now += seconds

    def put(self, name: str, weights: str | None = "good") -> None:
        (self.root / name).mkdir(exist_ok=True)
        (self.root / name / "adapter_config.json").write_text("{}")
        if weights is not None:
            (self.root / name / "adapter_model.safetensors").write_text(weights)

    def take(self, name: str) -> None:
        for file in (self.root / name).iterdir():
            file.unlink()
        (self.root / name).rmdir()

    async def look(self, server: int = 0, times: int = 2) -> None:
        """Has a server scan until what has changed counts, and do what follows from it."""
        for _ in range(times):
            await self.servers[server].scan()
            await settle()

    async def ask(self, name: str, server: int = 0) -> Any:
        """A request: the weights that answer it, or the status of the refusal."""
        refusal = await self.servers[server].prepare(name)
        if refusal is not None:
            return refusal.error.code
        lora = self.models[server].lora_requests.get(name)
        return None if lora is None else self.engine.held.get(lora.lora_int_id, "not loaded")


async def settle() -> None:
    """Lets background work go on until there is nothing left to do but to wait."""
    for _ in range(20):
        await asyncio.sleep(0)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Has a test's coroutine run to its end."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@pytest.fixture(autouse=True)
def without_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_directory, "_GRACE_S", 0.0)


@in_a_loop
async def test_all_names_are_known_and_nothing_is_read_before_its_first_use(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for number in range(20):
        site.put(f"customer-{number}", f"weights {number}")
    await site.look(times=1)
    assert len(site.models[0].lora_requests) == 20
    assert site.engine.read == []
    for _ in range(2):
        assert await site.ask("customer-7") == "weights 7"
    assert site.engine.read == ["customer-7: weights 7"]


@in_a_loop
async def test_where_every_name_is_the_base_models_an_adapters_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    monkeypatch.setattr(registration, "acts_for", lambda models: True)

    site = Site(tmp_path)
    (models,) = site.models
    DIRECTORY.set(models, site.servers[0])
    processor = site.engine.output_processor = SimpleNamespace()
    METER.set(processor, ServerMeter(None))

    async def status(name: str) -> int | None:
        chosen = await model_names.choose(HttpCall({}), models, name, {})
        return None if isinstance(chosen, model_names.Chosen) else chosen.error.code

    await site.look(times=1)
    site.put("acme", "one")
    site.put("broken", "bad")
    assert await status("acme") is None
    assert models.lora_requests["acme"].lora_int_id in site.engine.held
    assert await status("broken") == 400
    for name in ("nobody", "nobody\n"):
        assert await status(name) is None
        assert name not in models.lora_requests


@in_a_loop
async def test_what_was_read_for_a_client_that_has_disconnected_goes_with_its_folder(
    tmp_path: Path,
) -> None:
    engine = SlowEngine()
    site = Site(tmp_path, engine=engine)
    site.put("acme")
    await engine.read_for_nobody(asyncio.create_task(site.ask("acme")))
    assert list(engine.held.values()) == ["good"]
    site.take("acme")
    await site.look()
    assert engine.held == {}


@in_a_loop
async def test_a_tenant_has_no_more_adapters_read_for_the_first_time_by_disconnecting(
    tmp_path: Path,
) -> None:
    engine, turns = SlowEngine(), asyncio.Semaphore(1)
    site = Site(tmp_path, engine=engine)
    site.put("acme")

    async def ask() -> Any:
        caller = Caller(Role.TENANT, account=SimpleNamespace(first_readings=turns))
        current_caller.set(caller)
        return await site.ask("acme")

    request = asyncio.create_task(ask())
    await asyncio.wait_for(engine.is_asked.wait(), 10)
    request.cancel()
    await settle()
    assert turns.locked()
    engine.may_read.set()
    await asyncio.wait({request}, timeout=10)
    assert not turns.locked()


@in_a_loop
async def test_few_names_of_a_tenant_are_looked_for_at_once(tmp_path: Path) -> None:
    """One thread looks, and the storage may be slow: others' names wait behind them."""
    under_way = most = 0

    async def look(find: Any, name: str) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return find(name)

    site = Site(tmp_path)
    site.servers[0]._looks.wait = look  # type: ignore[assignment, method-assign]
    current_caller.set(Caller(Role.TENANT, account=Account(Tenant("acme"))))
    asked = await asyncio.gather(*(site.ask(f"acme-{number}") for number in range(20)))
    assert asked == [None] * 20
    assert most == MAX_FIRST_READINGS


@in_a_loop
async def test_requests_that_come_while_storage_hangs_leave_little_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_directory, "_FIND_LIMIT_S", 0.0001)
    answers = threading.Event()
    site = Site(tmp_path)
    server = site.servers[0]
    monkeypatch.setattr(server._directories, "find", lambda name: answers.wait(60) and None)
    try:
        for number in range(3_000):
            assert await site.ask(f"nobody-{number}") is None
        assert server._thread._work_queue.qsize() < 2_000
    finally:
        answers.set()


@in_a_loop
async def test_a_version_that_the_storage_withholds_is_tried_again(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.put("acme", "good")
    await site.look(times=1)
    assert await site.ask("acme") == "good"
    site.put("acme", "away")
    for _ in range(60):  # two minutes
        await site.look(times=1)
        site.pass_time(SCAN_S)
    # After 2, 6, 14, 30, 62 and 122 seconds.
    assert site.engine.read == ["acme: good", *["acme: away"] * 6]
    assert await site.ask("acme") == "good"


@in_a_loop
async def test_a_bad_adapter_is_refused_from_memory_until_its_files_change(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.put("acme", "bad")
    await site.look()
    for _ in range(3):
        assert await site.ask("acme") == 400
    assert site.engine.read == ["acme: bad"]
    site.put("acme", "now good")
    assert await site.ask("acme") == "now good"


@pytest.mark.parametrize(
    "codes",
    [
        *((Code.WRONG_DIGEST,), (Code.NOT_SIGNED,), (Code.WRONG_SIGNATURE,)),
        (Code.NOT_AS_SIGNED, Code.NOT_AS_SIGNED),
    ],
    ids=["digest", "not-signed", "wrong-signature", "not-as-signed"],
)
@in_a_loop
async def test_what_is_refused_for_what_is_not_in_its_files_serves_once_it_may(
    tmp_path: Path, codes: tuple[Code, ...]
) -> None:
    """As soon as its digest is required, or it is signed: neither changes its two files."""
    engine = StrictEngine()
    site = Site(tmp_path, engine=engine)
    site.put("acme")
    engine.codes = codes
    assert await site.ask("acme") == 400
    engine.codes = None
    assert await site.ask("acme") == 400
    site.pass_time(2.1)
    assert await site.ask("acme") == "good"


@in_a_loop
async def test_a_refusal_is_written_without_a_warning(tmp_path: Path) -> None:
    """Each would be three lines in the server's log."""
    site = Site(tmp_path)
    site.put("acme", "bad")
    refusal = await site.servers[0].prepare("acme")
    assert refusal is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal.model_dump()["error"]["problems"][0]["code"] == "not-finite"


@pytest.mark.parametrize("weights", ["bad", "away"])
@in_a_loop
async def test_the_reason_of_a_refusal_is_reported_until_the_adapter_serves(
    tmp_path: Path, weights: str
) -> None:
    site = Site(tmp_path)
    site.put("acme", weights)
    await site.look()
    assert site.servers[0].refused() == {}, "nobody has tried it"
    await site.ask("acme")
    number = site.models[0].lora_requests["acme"].lora_int_id
    site.pass_time(3600)
    reported = site.servers[0].refused()
    assert reported.keys() == {number}
    assert f"{weights} weights" in reported[number]
    site.put("acme", "now good")
    assert await site.ask("acme") == "now good"
    assert site.servers[0].refused() == {}
    site.put("acme", "bad")
    await site.look()
    number = site.models[0].lora_requests["acme"].lora_int_id
    assert "bad weights" in site.servers[0].refused()[number], "the old version serves on"
    site.take("acme")
    await site.look()
    assert site.servers[0].refused() == {}


@in_a_loop
async def test_a_folder_that_comes_back_as_it_was_is_not_freed_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_directory, "_GRACE_S", 0.1)
    site = Site(tmp_path)
    site.put("acme")
    assert await site.ask("acme") == "good"
    (tmp_path / "acme").rename(tmp_path / ".acme")
    await site.look()
    assert await site.ask("acme") is None
    (tmp_path / ".acme").rename(tmp_path / "acme")
    assert await site.ask("acme") == "good"
    await asyncio.sleep(0.2)
    assert await site.ask("acme") == "good"


@pytest.mark.parametrize("name", [BASE, "registered"])
@in_a_loop
async def test_a_name_that_is_taken_stays_with_its_owner(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    site = Site(tmp_path)
    owner = LoRARequest("registered", 1, "/elsewhere")
    site.models[0].lora_requests["registered"] = owner
    site.put(name)
    await site.look(times=3)
    assert await site.ask(name) in (None, "not loaded")
    assert site.models[0].lora_requests == {"registered": owner}
    assert site.engine.read == []
    if name == "registered":  # its folder takes over once it has been unloaded
        del site.models[0].lora_requests["registered"]
        assert await site.ask(name) == "good"
    assert caplog.text.count("is not served: another model has its name") == 1


@in_a_loop
async def test_a_folder_that_is_named_like_a_route_keeps_no_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever fills the directory need not know the routes."""
    directory, file = tmp_path / "adapters", tmp_path / "routes.json"
    directory.mkdir()
    file.write_text('{"routes": {"help": "acme", "old": "gone"}}')
    settings = MultiLoRAConfig(adapter_dir=(str(directory),), routes=str(file))
    for module in (adapter_directory, preload, routes, source_names):
        monkeypatch.setattr(module, "settings_of", lambda config: settings)
    monkeypatch.setattr(start, "is_active_behind", lambda client: True)
    monkeypatch.setattr(registration, "acts_for", lambda models: True)
    # What has to do with a real engine.
    monkeypatch.setattr(start.engine_calls, "engine_reports", nothing)
    for module in (registration, start.shared_names, start.metering):
        monkeypatch.setattr(module, "start", lambda models: None)
    monkeypatch.setattr(start.metering, "end_all_at_shutdown", lambda client: None)

    site = Site(directory)
    for name in ("acme", "help"):
        site.put(name)
    models: Any = site.models[0]
    models.base_model_paths = [SimpleNamespace(name=BASE)]
    parallel = SimpleNamespace(_api_process_count=1)
    models.engine_client = SimpleNamespace(
        engine_core=site.engine,
        output_processor=SimpleNamespace(request_states={}),
        vllm_config=SimpleNamespace(parallel_config=parallel),
    )
    await start.start(models)
    assert set(public_names(models)) == {"acme"}
    assert "help" in (ROUTES.get(models) or ())
    assert caplog.text.count("help is not served: another model has its name") == 1
    assert "'old' leads to names that nobody serves yet: gone" in caplog.text
    assert "'help' leads" not in caplog.text


async def nothing(*_: Any) -> None:
    """Does what is not looked at here."""


@in_a_loop
async def test_an_adapter_unloaded_over_http_stays_away_until_its_folder_changes(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path)
    site.put("acme", "one")
    assert await site.ask("acme") == "one"
    request = SimpleNamespace(lora_name="acme")
    models: Any = site.models[0]
    assert "removed" in await registration.unload_adapter(models, request)
    assert site.engine.held == {}
    assert await site.ask("acme") is None
    await site.look()
    assert await site.ask("acme") is None
    site.put("acme", "version two")
    await site.look()
    assert await site.ask("acme") == "version two"


@in_a_loop
async def test_a_look_that_fails_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_directory, "SCAN_S", 0.0)

    site = Site(tmp_path)
    (server,) = site.servers
    looks = asyncio.Queue[int]()

    async def fail() -> None:
        looks.put_nowait(1)
        raise OSError("the storage is away")

    monkeypatch.setattr(server, "scan", fail)
    watching = asyncio.create_task(server.watch())
    for _ in range(3):
        await asyncio.wait_for(looks.get(), 10)
    watching.cancel()


@in_a_loop
async def test_of_a_folder_that_had_gone_before_its_first_request_nothing_stays_in_the_engine(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path)
    site.put("acme")
    await site.look()
    site.take("acme")
    assert await site.ask("acme") == "not loaded"  # the request goes to the engine
    lora = site.models[0].lora_requests["acme"]
    site.engine.held[lora.lora_int_id] = "the folder does not exist"
    await site.look()
    assert "acme" not in site.models[0].lora_requests
    assert site.engine.held == {}


@in_a_loop
async def test_only_looks_that_always_take_long_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that has hung once has whatever changes seen as soon as ever."""
    now, took_s, pauses = 0.0, [0.1, 600.0, 0.1, 40.0, 60.0], list[float]()

    async def scan() -> None:
        nonlocal now
        now += took_s.pop(0)

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        if not took_s:
            raise asyncio.CancelledError

    (server,) = Site(tmp_path).servers
    monkeypatch.setattr(server, "scan", scan)
    monkeypatch.setattr(adapter_directory, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(adapter_directory.asyncio, "sleep", pause)
    with pytest.raises(asyncio.CancelledError):
        await server.watch()
    assert pauses == pytest.approx([SCAN_S] * 5 + [200.0])


@in_a_loop
async def test_api_servers_agree_without_asking_each_other(tmp_path: Path) -> None:
    site = Site(tmp_path, servers=2)
    site.put("acme", "one")
    for server in range(2):
        await site.look(server, times=1)
        assert await site.ask("acme", server) == "one"
    assert site.engine.read == ["acme: one"]
    site.put("acme", "version two")
    await site.look(0)
    assert await site.ask("acme", 0) == "version two"
    for server in range(2):
        await site.look(server)
        assert await site.ask("acme", server) == "version two"
    assert list(site.engine.held.values()) == ["version two"]
    assert all(number >= FIRST_NUMBER for number in site.engine.held)


@in_a_loop
async def test_a_server_that_has_not_used_an_adapter_keeps_what_another_serves(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path, servers=2)
    site.put("acme", "good")
    for server in range(2):
        await site.look(server, times=1)
    assert await site.ask("acme", 0) == "good"
    site.put("acme", "bad")
    for server in range(2):
        await site.look(server)
    for _ in range(2):
        assert await site.ask("acme", 1) == "good"


@pytest.mark.parametrize(
    ("fault", "status", "servers"),
    [("bad", 400, 1), ("bad", 400, 2), ("away", 503, 1)],
    ids=["bad", "bad-several-servers", "away"],
)
@in_a_loop
async def test_what_one_engine_refuses_no_other_keeps(
    tmp_path: Path, fault: str, status: int, servers: int
) -> None:
    engine = TwoEngines()
    site = Site(tmp_path, servers, engine)
    site.put("acme", "good")
    engine.fault = fault
    assert await site.ask("acme") == status
    await settle()
    assert engine.held == engine.held_by_second == {}
    engine.fault = None
    site.put("acme", "version two")
    assert await site.ask("acme") == "version two"
    engine.fault = fault
    site.put("acme", "version three")
    await site.look()
    assert await site.ask("acme") == "version two"
    for held in (engine.held, engine.held_by_second):
        assert list(held.values()) == ["version two"]


@in_a_loop
async def test_a_new_version_that_one_engine_refuses_stays_nowhere_under_an_old_number(
    tmp_path: Path,
) -> None:
    """No request has used the old version: there is none to go on with."""
    engine = TwoEngines()
    site = Site(tmp_path, engine=engine)
    site.put("acme", "good")
    await site.look()
    site.put("acme", "version two")
    engine.fault = "bad"
    assert await site.ask("acme") == 400
    await settle()
    assert engine.held == {}


@in_a_loop
async def test_what_one_engine_could_not_read_goes_with_its_folder(tmp_path: Path) -> None:
    engine = TwoEngines()
    site = Site(tmp_path, 2, engine)
    site.put("acme", "good")
    engine.fault = "away"
    assert await site.ask("acme") == 503
    site.take("acme")
    await site.look()
    assert engine.held == {}
