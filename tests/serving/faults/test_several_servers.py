"""Two API servers in front of two engines: what one registers, all serve, from one copy.

A second server of the machine, for the same model, serves from that copy as well.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from tests.attacks.poison import poisoned
from vllm_multilora.store.clients.client import StoreClient
from vllm_multilora.store.protocol.messages import Description
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE, socket_path
from vllm_multilora.store.store_launch import StoreProcess
from vllm_multilora.tenants.keys import stored

from .. import completions
from ..engine import store_folder
from ..exposition import scrape, values
from ..metered import User, Work, assert_adds_up
from ..models.cases import Case, Scenario
from ..models.recipes import LINEAR_RECIPES
from ..server import VllmServer
from ..stores import observer, store_process
from .faulty_reader import FAULT, FAULTY_READER

pytestmark = pytest.mark.serving

BASE = "base"
NAMES = tuple(recipe.name for recipe in LINEAR_RECIPES[:4])
UNREAD = tuple(recipe.name for recipe in LINEAR_RECIPES[4:7])
"""Adapters whose weights no other adapter has."""
PLACES = len(NAMES)
"""In host memory."""
SETTINGS = (
    *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager", "--seed", "0"),
    *("--max-model-len", "128", "--max-num-seqs", "16", "--block-size", "32"),
    *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", str(PLACES), "--max-lora-rank", "64"),
)
ENVIRONMENT = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    # That it is set, to whatever, lets vLLM 0.33's engines use one NUMA node.
    "VLLM_CPU_SIM_MULTI_NUMA": "0",
}
SEGMENT = "memfd:multilora-"
ASKED = 24
"""Requests, each over a connection of its own: the kernel deals them out to both servers."""
METERED = int(os.environ.get("MULTILORA_METERED_REQUESTS", "60"))
KEY, ACME, ZEN = "sk-operator", "sk-acme", "sk-zen"
ROUTE = "support"
TENANTS = {
    "acme": {
        "keys": [stored(ACME)],
        "adapters": ["my-*"],
        "routes": [ROUTE],
        "base_model": True,
    },
    "zen": {"keys": [stored(ZEN)], "adapters": ["zens-*"], "base_model": True},
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@contextlib.contextmanager
def faulty_store() -> Iterator[str]:
    """The folder of a running store that has faults for adapters that ask for them."""
    with store_folder() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, folder)
        with contextlib.closing(StoreClient(StoreProcess(FAULTY_READER), "tests", role="observer")):
            yield folder


@pytest.fixture(scope="module")
def server(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "adapters").mkdir()
    (folder / "tenants.json").write_text(json.dumps({"tenants": TENANTS}))
    (folder / "routes.json").write_text(json.dumps({"routes": {ROUTE: {"adapter": "my-first"}}}))
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    with (
        faulty_store() as stores,
        VllmServer(
            llama.base,
            *("--api-server-count", "2", "--data-parallel-size", "2", *SETTINGS),
            *("--multilora-adapter-dir", str(folder / "adapters")),
            *(
                "--multilora-tenants",
                str(folder / "tenants.json"),
                "--enable-prompt-tokens-details",
            ),
            *("--multilora-routes", str(folder / "routes.json")),
            *("--multilora-usage-log", str(folder / "usage.jsonl"), "--multilora-latency-metrics"),
            *("--chat-template", str(folder / "chat.jinja")),
            api_key=KEY,
            log=folder / "vllm.log",
            env=ENVIRONMENT | {FOLDER_VARIABLE: stores},
            start_timeout=480.0,
        ) as running,
    ):
        yield running


def ask_both(server: VllmServer, model: str, case: Case, *, key: str = KEY) -> list[httpx.Response]:
    body = completions.body(model, case)
    return [post(server, "/v1/completions", body, key=key) for _ in range(ASKED)]


def post(server: VllmServer, path: str, body: object, *, key: str | None = KEY) -> httpx.Response:
    """Over a connection of its own."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(trust_env=False, timeout=60, headers=headers) as client:
        return client.post(f"{server.url}{path}", json=body)


def load(server: VllmServer, name: str, path: Path, **options: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **options}
    return server.post("/v1/load_lora_adapter", body)


def assert_both_serve(server: VllmServer, model: str, case: Case) -> None:
    """Both answer, both say with which version, and what both have used is one sum."""
    before = generated(server, model)
    responses = ask_both(server, model, case)
    for response in responses:
        assert response.status_code == 200, f"{response.text}\n{server.log_tail()}"
        assert completions.token_ids(response) == case.expected.tokens
    (row,) = (r for r in server.get("/v1/lora_adapters").json()["data"] if r["id"] == model)
    versions = {response.headers["x-multilora-version"] for response in responses}
    assert versions == {row["digest"][:16]}
    used = sum(response.json()["usage"]["completion_tokens"] for response in responses)
    assert generated(server, model) - before == used


def generated(server: VllmServer, model: str) -> float:
    found = values(scrape(server), "vllm:lora_generation_tokens_total", "lora_name")
    return found.get(model, 0)


@pytest.mark.smoke("DP 2", "several API servers")
def test_every_api_server_shows_every_engine(server: VllmServer, llama: Scenario) -> None:
    """Whichever answers a scrape. The first test, as there is room for all in host memory."""
    sources = {f"shown-{name}": name for name in UNREAD}
    before = disk_reads(scrape(server))
    for name, source in sources.items():
        assert load(server, name, llama.adapters[source]).status_code == 200
        for _ in range(2):
            completions.assert_serves(server, name, llama.cases_of(source)[0])
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/metrics"
    texts = [httpx.get(url, headers=headers, trust_env=False).text for _ in range(8)]
    for name in sources:
        assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).is_success
    for text in texts:
        asked = values(text, "vllm:lora_requests_by_adapter", "lora_name")
        assert {name: asked.get(name) for name in sources} == dict.fromkeys(sources, 2)
        slots = values(text, "vllm:lora_slots", "engine", "model_name")
        assert slots == {("0", BASE): 2, ("1", BASE): 2}
        # The engines have a store in common.
        assert disk_reads(text) - before == len(sources)


def disk_reads(text: str) -> float:
    """The adapters that all engines together have had read from files."""
    reads = values(text, "vllm:lora_adapter_load_total", "source", "engine")
    return sum(number for (source, _), number in reads.items() if source == "disk")


def test_both_engines_serve_what_is_read_once_for_them(server: VllmServer, llama: Scenario) -> None:
    """Read for each, files that are written meanwhile would be another version in either."""
    folder = server.log.parent / "adapters" / "found"
    prepared = shutil.copytree(llama.adapters[UNREAD[0]], folder.with_name(".found"))
    (prepared / FAULT).write_text("two at a time")  # a second job would find it bad
    before = disk_reads(scrape(server))
    prepared.rename(folder)
    assert_both_serve(server, "found", llama.cases_of(UNREAD[0])[0])
    assert eventually(lambda: disk_reads(scrape(server)) == before + 1)
    shutil.rmtree(folder)


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return held


@pytest.mark.smoke("DP 2", "several API servers")
def test_what_one_registers_both_serve_at_once(
    server: VllmServer, llama: Scenario, tmp_path: Path
) -> None:
    for name in NAMES:
        assert load(server, f"my-{name}", llama.adapters[name]).status_code == 200
        assert_both_serve(server, f"my-{name}", llama.cases_of(name)[0])
    assert "vllm:lora_slots" in server.get("/metrics").text
    assert server.post("/v1/unload_lora_adapter", {"lora_name": f"my-{NAMES[0]}"}).is_success
    gone = ask_both(server, f"my-{NAMES[0]}", llama.cases_of(NAMES[0])[0])
    assert {response.status_code for response in gone} == {404}


def test_a_reload_serves_new_weights_through_both(
    server: VllmServer, llama: Scenario, tmp_path: Path
) -> None:
    folder = tmp_path / "acme"
    shutil.copytree(llama.adapters[NAMES[1]], folder)
    assert load(server, "acme", folder).status_code == 200
    assert_both_serve(server, "acme", llama.cases_of(NAMES[1])[0])
    shutil.rmtree(folder)
    shutil.copytree(llama.adapters[NAMES[2]], folder)
    assert load(server, "acme", folder, load_inplace=True).status_code == 200
    assert_both_serve(server, "acme", llama.cases_of(NAMES[2])[0])


def test_a_name_is_refused_by_both_where_either_has_it(server: VllmServer, llama: Scenario) -> None:
    assert load(server, "twice", llama.adapters[NAMES[3]]).status_code == 200
    again = set()
    for _ in range(ASKED):
        body = {"lora_name": "twice", "lora_path": str(llama.adapters[NAMES[3]])}
        again.add(post(server, "/v1/load_lora_adapter", body).status_code)
    assert again == {400}


def test_both_keep_tenants_apart_in_the_same_way(server: VllmServer, llama: Scenario) -> None:
    """A prefix that one has cached for a tenant is the other's too, and no other tenant's."""
    [case] = [case for case in llama.cases_of(None) if len(case.prompt) == 40]
    for key in (ACME, ZEN):
        details = [
            response.json()["usage"]["prompt_tokens_details"] or {}
            for response in ask_both(server, BASE, case, key=key)
        ]
        found = [detail.get("cached_tokens", 0) for detail in details]
        # Each of the two engines computes the prefix once.
        assert found[0] == 0
        assert sorted(found)[2:] == [32] * (ASKED - 2)
    assert load(server, "my-own", llama.adapters[NAMES[0]]).status_code == 200
    own = llama.cases_of(NAMES[0])[0]
    for response in ask_both(server, "my-own", own, key=ACME):
        assert completions.token_ids(response) == own.expected.tokens
    assert {r.status_code for r in ask_both(server, "my-own", own, key=ZEN)} == {404}


def test_all_servers_and_engines_meter_together_by_tenant(
    server: VllmServer, llama: Scenario
) -> None:
    names = ("my-first", "my-second", "my-left", "zens-own")
    for name, source in zip(names, NAMES, strict=True):
        assert load(server, name, llama.adapters[source]).status_code == 200
    users = [
        User("my-first", "my-first", tenant="acme", key=ACME),
        User("my-first", "my-first", key=KEY),
        User(ROUTE, "my-first", ROUTE, "acme", ACME),
        User("zens-own", "zens-own", tenant="zen", key=ZEN),
        User(BASE, None, tenant="zen", key=ZEN),
    ]
    plain = User("my-second", "my-second", tenant="acme", key=ACME)
    leaving = User("my-left", "my-left", tenant="acme", key=ACME)
    work, log = Work(users, plain, leaving, longest=120), server.log.with_name("usage.jsonl")
    lines = assert_adds_up(server.url, lambda: scrape(server), log, work, METERED)
    assert {line["tenant"] for line in lines} == {"acme", "zen", None}
    # Of each adapter, one observation for each of its choices that had a token.
    text = scrape(server)
    first, pace = (
        values(text, f"vllm:lora_time_{name}_seconds_count", "lora_name")
        for name in ("to_first_token", "per_output_token")
    )
    assert {*names[:2], names[3]} <= {*first}
    asked = sum(line["adapter"] == "my-second" for line in lines)
    assert first["my-second"] == asked >= pace["my-second"] > 0


def test_all_of_its_processes_are_one_server_to_the_store(server: VllmServer) -> None:
    """Else each engine would keep as many adapters of a tenant as all may together."""
    with observer(socket_path(server.store_folder)) as client:
        client.describe()
        (found,) = (m for m in client.poll(20.0) if isinstance(m, Description))
    named = {each.server for each in found.clients if each.role != "observer"}
    assert len(named) == 1, found.clients


def mapped(server: VllmServer) -> list[set[int]]:
    """The segments of host memory that each worker of a server has mapped, by their inodes."""
    found = []
    for process in psutil.Process(server.pid).children(recursive=True):
        lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        inodes = {int(line.split()[4]) for line in lines if SEGMENT in line}
        if inodes:
            found.append(inodes)
    return found


def held_bytes(store: psutil.Process) -> dict[int, int]:
    """The memory that each segment of a store takes, by its inode."""
    found = {}
    for link in Path(f"/proc/{store.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            if SEGMENT in str(link.readlink()):
                status = link.stat()
                found[status.st_ino] = 512 * status.st_blocks
    return found


def test_all_engines_of_all_servers_share_one_copy_of_each_adapter(
    server: VllmServer, llama: Scenario, tmp_path: Path
) -> None:
    folder = server.store_folder
    with VllmServer(
        llama.base,
        *SETTINGS,
        # The same rules: else the files would be read, and kept, once more.
        *("--multilora-adapter-dir", str(server.log.parent / "adapters")),
        log=tmp_path / "vllm.log",
        env=ENVIRONMENT | {FOLDER_VARIABLE: str(folder)},
    ) as second:
        segments = []
        for each in (server, second):
            for name in NAMES:  # which push out those of the tests before
                assert load(each, f"one-{name}", llama.adapters[name]).status_code == 200
                assert_both_serve(each, f"one-{name}", llama.cases_of(name)[0])
            segments.append(held_bytes(store_process(socket_path(folder))))
        workers = [*mapped(server), *mapped(second)]
        rows = [each.get("/v1/lora_adapters").json() for each in (server, second)]
        texts = [scrape(each) for each in (server, second)]
    assert segments[0] == segments[1], "the second server's copies"
    assert len(workers) == 3
    assert all(inodes <= segments[0].keys() for inodes in workers)
    assert len(set().union(*workers)) == len(segments[0])
    # Packs are of whole pages and have an index of their own instead of a file's header.
    files = sum((llama.adapters[n] / "adapter_model.safetensors").stat().st_size for n in NAMES)
    for row in rows:
        assert row["cpu"]["adapters"] == PLACES
        assert 0.9 * files < row["cpu"]["bytes"] < 1.2 * files
        # Pages of packs that were there before may be kept for those that come.
        assert row["cpu"]["bytes"] <= sum(segments[0].values())
    for text in texts:
        by_engine = values(text, "vllm:lora_cache_bytes", "tier", "engine")
        shown = {n for (tier, _), n in by_engine.items() if tier == "cpu"}
        assert shown == {rows[0]["cpu"]["bytes"]}


def test_adapters_that_fail_hurt_nobody_through_either(
    server: VllmServer, llama: Scenario, tmp_path: Path
) -> None:
    gone = shutil.copytree(llama.adapters[UNREAD[1]], tmp_path / "gone")
    assert load(server, "my-gone", gone).status_code == 200
    poison = poisoned(llama.adapters[NAMES[0]], tmp_path / "poison", "float32")
    assert load(server, "my-poison", poison).status_code == 200
    for name in NAMES:  # they push the others out of host memory
        assert load(server, f"my-{name}", llama.adapters[name], load_inplace=True).is_success
        completions.assert_serves(server, f"my-{name}", llama.cases_of(name)[0])
    shutil.rmtree(gone)
    good = [(f"my-{name}", llama.cases_of(name)[0]) for name in NAMES]
    bad = [(name, llama.cases_of(NAMES[0])[0]) for name in ("my-gone", "my-poison")]
    asked = [*bad, *good] * 4
    bodies = [completions.body(name, case) for name, case in asked]
    with ThreadPoolExecutor(ASKED) as pool:
        found = list(pool.map(partial(post, server, "/v1/completions"), bodies))
    for (name, case), response in zip(asked, found, strict=True):
        if name == "my-gone":
            assert response.status_code == 404, response.text
        elif name == "my-poison":
            assert response.status_code == 400, response.text
            assert "quarantined" in response.text
        else:
            assert response.status_code == 200, f"{response.text}\n{server.log_tail()}"
            assert completions.token_ids(response) == case.expected.tokens
