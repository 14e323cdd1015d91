"""Attacks at random on a running server, each of which knows how it must be answered."""

import contextlib
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx

from tests.adapters.corpus import BAD
from tests.attacks.poison import poisoned
from tests.attacks.site import HOSTILE_NAMES
from tests.serving.models.cases import Scenario

SLOW = {"alpha-pattern-that-fills-memory", "rank-pattern-that-never-ends"}
"""Adapters of the corpus that keep a check busy: one in ten attacks from there."""

Attack = Callable[["Attackers"], str | None]


class Attackers:
    """Hostile customers of one server; from any thread.

    Args:
        url: The server's.
        key: That registrations want.
        scenario: Its last adapter is what they build theirs from.
        folder: Where they may write, and the server may read.
        source: Random numbers.
        first: Of the numbers by which their adapters are called, which are nobody else's.
    """

    def __init__(
        self,
        url: str,
        key: str,
        scenario: Scenario,
        folder: Path,
        source: random.Random,
        first: int,
    ) -> None:
        self.url = url
        self.folder = folder
        self.random = source
        self.sources = list(scenario.adapters.values())
        self.source = self.sources[-1]
        self._numbers = count(first)
        self._key = key
        self._corpus = {
            name: case.write(folder / f"corpus-{name}")
            for name, case in BAD.items()
            if not case.is_right_untied  # as the base models are that are attacked
        }

    def attack(self) -> tuple[str, str | None]:
        """One attack; what it was, and what was wrong with the answers, if anything."""
        chosen = self.random.choice(ATTACKS)
        try:
            return chosen.__name__, chosen(self)
        except (httpx.HTTPError, OSError) as error:
            return chosen.__name__, repr(error)

    def client(self) -> httpx.Client:
        """For one request. Of clients that threads share, one may close another's connection."""
        return httpx.Client(
            base_url=self.url,
            timeout=120,
            trust_env=False,
            verify=False,  # of certificates, which are long to read and not asked for here
            headers={"Authorization": f"Bearer {self._key}"},
        )

    def number(self) -> int:
        return next(self._numbers)

    def copy(self, name: str) -> Path:
        """A sound adapter of their own."""
        return Path(shutil.copytree(self.source, self.folder / name))

    def corpus(self) -> Path:
        is_slow = self.random.random() < 0.1
        return self._corpus[
            self.random.choice([name for name in self._corpus if (name in SLOW) == is_slow])
        ]

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def load(self, name: str, path: Path | str, **options: Any) -> int:
        body = {"lora_name": name, "lora_path": str(path), **options}
        return self.post("/v1/load_lora_adapter", body).status_code

    def unload(self, name: str) -> int:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code

    def ask(self, model: str, tokens: int = 4, length: int = 30) -> int:
        return self.post("/v1/completions", self.body(model, tokens, length)).status_code

    def body(self, model: str, tokens: int, length: int) -> dict[str, Any]:
        prompt = [self.random.randrange(300) for _ in range(length)]
        return {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True}

    def give_up(self, model: str) -> None:
        """Leaves in the middle of an answer."""
        body = self.body(model, 60, 60) | {"stream": True}
        with (
            contextlib.suppress(httpx.HTTPError),
            self.client() as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            next(response.iter_bytes(), None)


def expect(found: int, *expected: int) -> str | None:
    return None if found in expected else f"{found}, expected {' or '.join(map(str, expected))}"


def only(expected: int, call: Callable[[], int], times: int) -> str | None:
    """What is wrong with the statuses of calls at once."""
    with ThreadPoolExecutor(30) as pool:
        found = set(pool.map(lambda _: call(), range(times)))
    return None if found == {expected} else f"answered with {found}"


def register_what_is_broken(by: Attackers) -> str | None:
    return expect(by.load(f"broken-{by.number()}", by.corpus()), 400, 403, 404, 503)


def call_oneself_names(by: Attackers) -> str | None:
    name = by.random.choice([n for n in HOSTILE_NAMES.values() if "\ud800" not in n])
    wrong = expect(by.load(name, by.source), 400) or expect(by.ask(name), 404)
    return wrong or expect(by.unload(name), 404)


def poison(by: Attackers) -> str | None:
    number = by.number()
    name, folder = f"poison-{number}", by.folder / f"poison-{number}"
    poisoned(by.source, folder, "float32", number)
    try:
        wrong = expect(by.load(name, folder), 200)
        for _ in range(2):
            wrong = wrong or expect(by.ask(name, length=80), 400)
        return wrong or expect(by.unload(name), 200)
    finally:
        shutil.rmtree(folder)


def flood(by: Attackers) -> str | None:
    name = f"flood-{by.number()}"
    folder = by.copy(name)
    wrong = expect(by.load(name, folder), 200)
    wrong = wrong or only(200, lambda: by.ask(name, 20), 60)
    by.unload(name)
    shutil.rmtree(folder)
    return wrong


def flood_with_nobody(by: Attackers) -> str | None:
    return only(404, lambda: by.ask(f"nobody-{by.number()}"), 60)


def abort(by: Attackers) -> str | None:
    name = f"abort-{by.number()}"
    folder = by.copy(name)
    wrong = expect(by.load(name, folder), 200)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: by.give_up(name), range(16)))
    wrong = wrong or expect(by.unload(name), 200)
    shutil.rmtree(folder)
    return wrong


def reload(by: Attackers) -> str | None:
    """Also while requests run, whose answers are then of one version or the other."""
    name = f"reload-{by.number()}"
    with ThreadPoolExecutor(4) as pool:
        for _ in range(6):
            path = by.random.choice(by.sources)
            if wrong := expect(by.load(name, path, load_inplace=True), 200):
                return wrong
            asked = pool.submit(by.ask, name, 20)
    return expect(asked.result(), 200) or expect(by.unload(name), 200)


def unload_under_way(by: Attackers) -> str | None:
    name = f"unload-{by.number()}"
    wrong = expect(by.load(name, by.source), 200)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(by.ask, name, 40) for _ in range(8)]
        wrong = wrong or expect(by.unload(name), 200)
    return wrong or next(filter(None, (expect(a.result(), 200, 404) for a in asked)), None)


def delete_files(by: Attackers) -> str | None:
    name = f"deleted-{by.number()}"
    folder = by.copy(name)
    wrong = expect(by.load(name, folder), 200)
    shutil.rmtree(folder)
    wrong = wrong or expect(by.ask(name), 200, 404)
    return wrong or expect(by.unload(name), 200)


def break_files(by: Attackers) -> str | None:
    name = f"rewritten-{by.number()}"
    folder = by.copy(name)
    wrong = expect(by.load(name, folder), 200)
    shutil.rmtree(folder)
    if (broken := by.corpus()).is_dir():
        shutil.copytree(broken, folder, ignore=_no_files)
    wrong = wrong or expect(by.ask(name), 200, 400, 404, 503)
    wrong = wrong or expect(by.load(name, folder, load_inplace=True), 200, 400, 403, 404, 503)
    shutil.rmtree(folder, ignore_errors=True)
    return wrong or expect(by.unload(name), 200)


def _no_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file()]


def use_a_wrong_key(by: Attackers) -> str | None:
    headers = {"Authorization": f"Bearer wrong-{by.number()}"}
    body = {"lora_name": "x", "lora_path": str(by.source)}
    found = [
        by.post("/v1/load_lora_adapter", body, headers=headers).status_code,
        by.post("/v1/completions", by.body("x", 1, 3), headers=headers).status_code,
        by.get("/v1/lora_adapters", headers=headers).status_code,
    ]
    return None if set(found) == {401} else f"answered with {found}"


def ask_for_the_listing(by: Attackers) -> str | None:
    return only(200, lambda: by.get("/v1/lora_adapters").status_code, 100)


def send_junk(by: Attackers) -> str | None:
    content = by.random.randbytes(by.random.randrange(2_000))
    headers = {"content-type": "application/json"}
    path = by.random.choice(["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
    with by.client() as client:
        found = client.post(path, content=content, headers=headers).status_code
    return expect(found, 400, 422)


ATTACKS: tuple[Attack, ...] = (
    register_what_is_broken,
    call_oneself_names,
    poison,
    flood,
    flood_with_nobody,
    abort,
    reload,
    unload_under_way,
    delete_files,
    break_files,
    use_a_wrong_key,
    ask_for_the_listing,
    send_junk,
)
