"""Sixteen well-behaved customers beside attackers, for as long as one likes.

A server with a tiny random Llama in float32, over HTTP and with a key. Two threads ask sixteen
adapters one after another, and compare each answer with PEFT's; another one asks for `/health`.
Attackers register what is broken, hostile names and poison, flood, give up, reload, unload, delete
and rewrite files and use wrong keys, at random (`benchmarks/loads/random_attacks.py`), and each
attack knows how it must be answered.

It fails if an answer was not PEFT's, `/health` was not 200, an attack was answered
otherwise than expected, a process grew by more than 2 % after the warm-up or by more than eight
descriptors and threads, or anything is left in /dev/shm that the server's processes had there.
oneDNN, with which PyTorch multiplies on CPUs, keeps what it compiles for each number of rows, up to
a thousand times and for half an hour's worth of growth here; the server is told to keep eight.
Before 0.33, an engine core and its workers keep some 45 bytes a step until there is none for a
second (libzmq queues commands for a socket that vLLM only looks at when idle). So once a minute all
customers and attackers stop together.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.harness.registry import Figure, benchmark
from benchmarks.loads.server import vllm_server
from tests.serving import completions
from tests.serving.models.cases import Scenario
from tests.serving.server import VllmServer
from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.store.protocol.store_folder import FOLDER_VARIABLE
from vllm_multilora.store.store_launch import RunningStore
from vllm_multilora.toolbox.commands.store import describe

if TYPE_CHECKING:
    from benchmarks.loads.random_attacks import Attackers

MIB = 2**20
CUSTOMERS = 16
KEY = "the-right-key"
MAX_GROWTH = 0.02
MAX_HANDLES = 8
WARM_UP_SHARE, WINDOW_SHARE = 0.3, 0.1
REST_EVERY_S, REST_S, REST_LIMIT_S = 60.0, 2.0, 120.0
SAMPLE_S = 2.0
HEALTH_LIMIT_S = 30.0
SHM = Path("/dev/shm")


@dataclass
class Findings:
    """What a run has seen; each thread adds to it.

    Attributes:
        answers: Of customers: right, and wrong.
        attacks: By name.
        wrong: What went wrong, in words.
        health: Looks at `/health`, and the longest in seconds.
        memory: Samples by process: seconds and bytes.
        handles: Likewise: seconds, and how many descriptors and threads it has.
        shared: Files in /dev/shm that the server's processes have had mapped or made.
    """

    answers: Counter[str] = field(default_factory=Counter)
    attacks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    handles: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)


class Run:
    """One run: its server, its customers and its attackers."""

    def __init__(self, server: VllmServer, scenario: Scenario, findings: Findings) -> None:
        self._server = server
        self._scenario = scenario
        self._findings = findings
        self._over = threading.Event()
        self._next_rest = time.monotonic() + REST_EVERY_S

    def go(self, seconds: float, attackers: list[Attackers]) -> None:
        """Runs for so long."""
        customers = [threading.Thread(target=self._behave, args=(number,)) for number in range(2)]
        hostile = [threading.Thread(target=self._attack, args=(one,)) for one in attackers]
        others = [threading.Thread(target=work) for work in (self._look, self._measure)]
        flows = len(customers) + len(hostile)
        self._resting = threading.Barrier(flows, self._let_rest, timeout=REST_LIMIT_S)
        for thread in (*customers, *hostile, *others):
            thread.start()
        self._over.wait(seconds)
        self._over.set()
        self._resting.abort()
        for thread in (*customers, *hostile, *others):
            thread.join()

    def _behave(self, number: int) -> None:
        cases = [case for case in self._scenario.cases if case.adapter is not None][:CUSTOMERS]
        while not self._over.is_set():
            for case in cases[number::2] + cases[1 - number :: 2]:
                assert case.adapter is not None
                response = completions.ask(self._server, case.adapter, case)
                if response.status_code != 200:
                    self._note(f"{case.adapter}: {response.status_code} {response.text[:300]}")
                    self._findings.answers["refused"] += 1
                elif completions.token_ids(response) != case.expected.tokens:
                    self._note(f"{case.adapter}: {completions.token_ids(response)}")
                    self._findings.answers["wrong"] += 1
                else:
                    self._findings.answers["right"] += 1
                self._rest()
                if self._over.is_set():
                    return

    def _attack(self, attackers: Attackers) -> None:
        while not self._over.is_set():
            name, wrong = attackers.attack()
            self._findings.attacks[name] += 1
            if wrong:
                self._note(f"{name}: {wrong}")
            self._rest()

    def _rest(self) -> None:
        """Waits for all others that ask and attack, when it is time, and stops with them."""
        if time.monotonic() >= self._next_rest:
            with contextlib.suppress(threading.BrokenBarrierError):  # it is over, or one hangs
                self._resting.wait()

    def _let_rest(self) -> None:
        self._over.wait(REST_S)
        self._next_rest = time.monotonic() + REST_EVERY_S

    def _look(self) -> None:
        while not self._over.wait(0.5):
            began = time.monotonic()
            try:
                status = self._server.get("/health").status_code
            except Exception as error:
                status, _ = 0, self._note(f"/health: {error!r}")
            self._findings.health.append(time.monotonic() - began)
            if status != 200:
                self._note(f"/health: {status}")

    def _measure(self) -> None:
        began = time.monotonic()
        while not self._over.wait(SAMPLE_S):
            for name, process in processes_of(self._server).items():
                try:
                    size = own_bytes(process.pid)
                    handles = process.num_fds() + process.num_threads()
                    paths = [Path(each.path) for each in process.memory_maps()]
                except (psutil.Error, OSError):
                    continue
                at = time.monotonic() - began
                self._findings.memory.setdefault(name, []).append((at, size))
                self._findings.handles.setdefault(name, []).append((at, handles))
                mapped = [path for path in paths if path.is_relative_to(SHM)]
                self._findings.shared |= {path.relative_to(SHM).parts[0] for path in mapped}

    def _note(self, what: str) -> None:
        self._findings.wrong.append(what)
        print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def own_bytes(pid: int) -> int:
    """Memory of a process's own, without what it maps of adapters, which has its own limit."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def processes_of(server: VllmServer) -> dict[str, psutil.Process]:
    """The server's processes and its store, by what they are."""
    parent = psutil.Process(server.pid)
    found = {}
    for process in [parent, *parent.children(recursive=True)]:
        try:
            name = " ".join(process.cmdline()).strip()[-40:]
        except psutil.Error:
            continue
        if "resource_tracker" not in name:
            found[f"{process.pid} {name}"] = process
    try:
        store = psutil.Process(describe(RunningStore()).pid)
        found[f"{store.pid} store"] = store
    except (MultiLoRAError, psutil.Error):
        pass
    return found


def growth(samples: list[tuple[float, int]]) -> tuple[float, float]:
    """What it was after the warm-up and at the end, each the median of a tenth of the run."""
    last = samples[-1][0]
    windows = ((WARM_UP_SHARE, WARM_UP_SHARE + WINDOW_SHARE), (1 - WINDOW_SHARE, 1.0))
    first, end = (
        statistics.median([size for at, size in samples if a * last <= at <= b * last] or [0])
        for a, b in windows
    )
    return first, end


@benchmark(
    workload="sixteen customers whose answers are compared with PEFT's, beside attackers",
    control="each process's memory after the warm-up",
    figure="answers that were not PEFT's, and how much of its memory a process has grown by",
    compares_to="none, and 2 %",
    quick={"minutes": 0.5},
)
def soak(minutes: float = 20.0, seed: int = 0, attackers: int = 2) -> Iterable[Figure]:
    """Sixteen well-behaved customers beside attackers, for as long as one likes."""
    from benchmarks.loads.random_attacks import Attackers
    from tests.serving.models.recipes import FLEET_RECIPES
    from tests.serving.models.scenarios import build_scenario
    from tests.serving.models.tiny_models import write_llama

    findings = Findings()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.environ[FOLDER_VARIABLE] = str(root / "store")
        (root / "store").mkdir(mode=0o700)
        scenario = build_scenario(
            root, write_llama, FLEET_RECIPES[: CUSTOMERS + 1], lengths=(11,), min_margin=0.02
        )
        with vllm_server(
            scenario.base,
            *("--served-model-name", "base", "--dtype", "float32", "--enforce-eager"),
            *("--seed", "0", "--max-model-len", "128", "--max-num-seqs", "16"),
            *("--block-size", "32", "--num-gpu-blocks-override", "96"),
            *("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "24"),
            *("--max-lora-rank", "64", "--disable-uvicorn-access-log"),
            "--lora-modules",
            *(f"{name}={path}" for name, path in list(scenario.adapters.items())[:CUSTOMERS]),
            log=root / "vllm.log",
            api_key=KEY,
            env={
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
            },
        ) as server:
            hostile = []
            for number in range(attackers):
                (folder := root / f"attacker-{number}").mkdir()
                source = random.Random(f"{seed} {number}")
                first = 100_000 * number
                hostile.append(Attackers(server.url, KEY, scenario, folder, source, first))
            Run(server, scenario, findings).go(60 * minutes, hostile)
            log_bytes = (root / "vllm.log").stat().st_size
        time.sleep(5)  # the store stays for two seconds
        left = sorted(name for name in findings.shared if (SHM / name).exists())
    grown = yield from figures_of(findings, log_bytes)
    if findings.wrong or grown or left:
        raise SystemExit(
            f"wrong: {len(findings.wrong)}; grown: {grown or 'nothing'}; "
            f"left in {SHM}: {left or 'nothing'}"
        )


def figures_of(findings: Findings, log_bytes: int) -> Generator[Figure, None, list[str]]:
    """The figures; returns which processes have grown."""
    grown, most = [], 0.0
    for name, samples in findings.memory.items():
        first, last = growth(samples)
        if not first or not last:  # a job of the store, or what did not live long enough
            continue
        most = max(most, 100 * (last / first - 1))
        if last / first - 1 > MAX_GROWTH:
            grown.append(f"{name}: {first / MIB:.1f} to {last / MIB:.1f} MiB")
    more = 0.0
    for name, samples in findings.handles.items():
        first, last = growth(samples)
        if not first or not last:
            continue
        more = max(more, last - first)
        if last - first > MAX_HANDLES:
            grown.append(f"{name}: {first:.0f} to {last:.0f} descriptors and threads")
    print(f"attacks: {dict(findings.attacks.most_common())}")
    for kind in ("right", "wrong", "refused"):
        yield Figure("", f"answers, {kind}", [findings.answers[kind]])
    yield Figure("", "attacks", [sum(findings.attacks.values())])
    yield Figure("", "most growth of a process, %", [most])
    yield Figure("", "most descriptors and threads more", [more])
    yield Figure("", "slowest /health, s", [max(findings.health)])
    yield Figure("", "log, MiB", [log_bytes / MIB])
    return grown
