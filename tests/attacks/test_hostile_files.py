"""Adapters' files that keep a check busy, beside customers who notice nothing of it."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.serving import completions
from tests.serving.stores import store_process
from vllm_multilora.store.protocol.store_folder import socket_path

from .site import GOOD, NAMES, Site

pytestmark = pytest.mark.serving

MIB = 1 << 20
LONGEST_GAP_S = 1.5
QUIET_GAP_S = 0.025  # at least, on a machine that others use
LONGEST_REGISTRATION_S = 5.0
ROUNDS = 2
VERSIONS = 10
MAX_GROWN_MIB = 3.0
LOGGED_BYTES = 6_000


def header_of_lists(folder: Path) -> None:
    header = b'{"__metadata__":[' + b"[]," * (40 * MIB // 3) + b"0]}"
    file = folder / "adapter_model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def change(folder: Path, **keys: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def long_expression(folder: Path) -> None:
    change(folder, rank_pattern={"|".join(f"x{number}" for number in range(480_000)): 8})


def many_patterns(folder: Path) -> None:
    change(folder, rank_pattern={f".*a.*b{number}": 8 for number in range(10_000)})


ATTACKS: tuple[Callable[[Path], None], ...] = (header_of_lists, long_expression, many_patterns)


class Stream:
    """A customer who reads one streamed answer after another, and notes the longest pause.

    Attributes:
        longest_s: Between two chunks, since it was last set.
        chunks: That have come.
    """

    def __init__(self, site: Site) -> None:
        self.longest_s = 0.0
        self.chunks = 0
        self._url = f"{site.server.url}/v1/completions"
        self._body = completions.body(GOOD, site.case, max_tokens=80, stream=True)

    def read_until(self, over: threading.Event) -> None:
        last = time.monotonic()
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not over.is_set():
                with client.stream("POST", self._url, json=self._body) as response:
                    assert response.status_code == 200
                    for _ in response.iter_lines():
                        now = time.monotonic()
                        self.longest_s = max(self.longest_s, now - last)
                        last, self.chunks = now, self.chunks + 1


@contextmanager
def streaming(site: Site) -> Iterator[Stream]:
    stream, over = Stream(site), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(stream.read_until, over)
        try:
            yield stream
        finally:
            over.set()
            reading.result()


def await_chunks(stream: Stream, number: int) -> None:
    end, deadline = stream.chunks + number, time.monotonic() + 60
    while stream.chunks < end:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_streams_and_registrations_go_on_while_hostile_files_are_checked(site: Site) -> None:
    folders = [site.put(NAMES[0], site.root / attack.__name__) for attack in ATTACKS]
    for attack, folder in zip(ATTACKS, folders, strict=True):
        attack(folder)
    others = [site.put(NAMES[1 + i], site.root / f"beside-{i}") for i in range(ROUNDS)]

    def register(folder: Path) -> tuple[Any, float]:
        start = time.monotonic()
        return site.load(folder.name, folder), time.monotonic() - start

    with streaming(site) as stream, ThreadPoolExecutor(len(ATTACKS)) as pool:
        await_chunks(stream, 200)
        stream.longest_s = 0.0
        await_chunks(stream, 400)
        quiet_s, stream.longest_s = stream.longest_s, 0.0
        for other in others:
            attacks = [pool.submit(register, folder) for folder in folders]
            registered, took_s = register(other)
            assert registered.status_code == 200, registered.text
            assert took_s < LONGEST_REGISTRATION_S
            for attack in attacks:
                refused, _ = attack.result()
                assert refused.status_code == 400, refused.text[:500]
    assert stream.longest_s < LONGEST_GAP_S
    assert stream.longest_s < 20 * max(quiet_s, QUIET_GAP_S)
    for i, other in enumerate(others):
        completions.assert_serves(site.server, other.name, site.scenario.cases_of(NAMES[1 + i])[0])
        site.unload(other.name)
    site.assert_unharmed()
    for folder in (*folders, *others):
        shutil.rmtree(folder)


def resident(site: Site) -> dict[str, float]:
    """MiB that each lasting process of the server takes."""
    server = psutil.Process(site.server.pid)
    store = store_process(socket_path(site.server.store_folder))
    processes = {server, store, *server.children(recursive=True)}
    return {f"{each.name()} {each.pid}": each.memory_info().rss / MIB for each in processes}


def test_memory_and_log_do_not_grow_with_bad_versions(site: Site) -> None:
    """Covers a registered adapter that is reloaded, and an adapter in a directory."""
    served = site.put(NAMES[0], site.root / "rewritten")
    assert site.load(served.name, served).status_code == 200
    found = site.put(NAMES[0], site.directory / "rewritten-too")

    def rewrite(first: int) -> None:
        for number in range(first, first + VERSIONS):
            patterns = {f"(a+)+{number}.{index}": 8 for index in range(9_000)}
            for folder in (served, found):
                change(folder, rank_pattern=patterns)
            reloaded = site.load(served.name, served, load_inplace=True)
            for refused in (reloaded, site.ask(found.name)):
                assert refused.status_code == 400, refused.text[:500]
                assert f"(a+)+{number}." in refused.text

    rewrite(0)
    before, written = resident(site), site.server.log.stat().st_size
    rewrite(VERSIONS)
    after = resident(site)
    assert after.keys() == before.keys()
    grown = {name: after[name] - before[name] for name in before}
    assert max(grown.values()) < MAX_GROWN_MIB
    assert site.server.log.stat().st_size - written < VERSIONS * LOGGED_BYTES
    completions.assert_serves(site.server, served.name, site.case)
    site.unload(served.name)
    shutil.rmtree(found)
