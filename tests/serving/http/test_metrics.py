"""What a real server says of its adapters after known loads, requests and unloads."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.promtool import run_promtool
from vllm_multilora.cli import main
from vllm_multilora.gateway.status.status_route import NEW_S
from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.label_values import OTHER
from vllm_multilora.store.memory.arena import PAGE

from .. import completions
from ..exposition import lines_of_lora_metrics, lora_samples, scrape, values
from ..models.cases import NEW_TOKENS, Scenario
from ..server import VllmServer

pytestmark = [pytest.mark.serving, pytest.mark.slow]

BASE = "base"
SETTINGS = (
    *("--served-model-name", BASE),
    *("--dtype", "float32", "--enforce-eager", "--seed", "0"),
    *("--max-model-len", "128", "--max-num-seqs", "16"),
    *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "64"),
)
SETTLED_S = 30
# What the adapters a to e are made of.
SOURCES = ("all-linear-r8", "qv-r5", "patterns", "rslora-r16", "max-rank-r64")


@dataclass(frozen=True)
class Deployment:
    server: VllmServer
    scenario: Scenario
    root: Path

    def load(self, name: str) -> int:
        body = {"lora_name": name, "lora_path": str(self.root / name)}
        return self.server.post("/v1/load_lora_adapter", body).status_code

    def unload(self, name: str) -> int:
        return self.server.post("/v1/unload_lora_adapter", {"lora_name": name}).status_code

    def ask(self, name: str) -> int:
        case = self.scenario.cases_of("all-linear-r8")[0]
        return completions.ask(self.server, name, case).status_code

    def listing(self) -> dict[str, Any]:
        time.sleep(NEW_S)  # an answer may be as old as that
        response = self.server.get("/v1/lora_adapters")
        assert response.status_code == 200, f"{response.text}\n{self.server.log_tail()}"
        found: dict[str, Any] = response.json()
        return found

    def scrape_with_cached(self, adapters: int) -> str:
        """The metrics once host memory holds so many; the store tells of it 20 times a second."""
        deadline = time.monotonic() + SETTLED_S
        while True:
            text = scrape(self.server)
            cached = values(text, "vllm:lora_cache_adapters", "tier").get("cpu")
            if cached == adapters:
                return text
            assert time.monotonic() < deadline, f"{cached} adapters in host memory, not {adapters}"
            time.sleep(0.1)

    def bytes_of(self, *names: str) -> int:
        """Bytes of adapters' tensors in their files, which are in the server's dtype."""
        return sum((self.root / n / "adapter_model.safetensors").stat().st_size for n in names)


@pytest.fixture(scope="module")
def deployment(llama: Scenario, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    root = tmp_path_factory.mktemp("adapters")
    for name, source in zip("abcde", SOURCES, strict=True):
        shutil.copytree(llama.adapters[source], root / name)
    shutil.copytree(root / "a", root / "damaged")
    (root / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with VllmServer(
        llama.base,
        *SETTINGS,
        *("--multilora-metrics-max-adapters", "4"),
        log=tmp_path_factory.mktemp("metrics") / "vllm.log",
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as server:
        yield Deployment(server, llama, root)


@pytest.mark.smoke("metrics")
def test_every_number_is_right_after_a_known_sequence(deployment: Deployment) -> None:
    expected_at_rest = {
        "vllm:lora_slots": 2,
        "vllm:lora_slots_free": 2,
        "vllm:lora_max_rank": 64,
        "vllm:lora_cache_adapters_limit": 3,
    }
    at_rest = scrape(deployment.server)
    # Warm-up adapters, of which vLLM has had some by now, count nowhere.
    nonzero = {sample.name: sample.value for sample in lora_samples(at_rest) if sample.value}
    assert nonzero == expected_at_rest

    assert [deployment.load(name) for name in "abc"] == [200] * 3
    assert deployment.ask("a") == 200  # host memory -> first slot
    assert deployment.ask("a") == 200  # has its slot
    assert deployment.ask("b") == 200  # host memory -> second slot
    assert deployment.ask("a") == 200  # has its slot
    assert deployment.ask("c") == 200  # takes b's slot
    assert deployment.load("d") == 200  # read and checked; host memory is full: stays on disk
    assert deployment.ask("d") == 200  # read again; takes b's host memory, then a's slot
    assert deployment.load("e") == 200  # one name too many for the metrics; stays on disk
    assert deployment.ask("b") == 200  # read again; takes a's host memory, then c's slot
    assert deployment.load("damaged") == 400
    assert deployment.load("missing") == 404
    shutil.move(deployment.root / "a", deployment.root / "a-elsewhere")
    assert deployment.ask("a") == 404  # accepted, and then not to be had
    assert deployment.unload("c") == 200
    assert deployment.ask(BASE) == 200
    shutil.move(deployment.root / "a-elsewhere", deployment.root / "a")

    text = deployment.scrape_with_cached(2)
    assert values(text, "vllm:lora_adapter_load_total", "source", "lora_name") == {
        ("disk", "a"): 1,
        ("disk", "b"): 2,
        ("disk", "c"): 1,
        ("disk", "d"): 2,
        ("disk", OTHER): 1,
        ("cpu", "a"): 1,
        ("cpu", "b"): 2,
        ("cpu", "c"): 1,
        ("cpu", "d"): 1,
    }
    assert values(text, "vllm:lora_adapter_evict_total", "tier", "lora_name") == {
        ("gpu", "b"): 1,
        ("gpu", "a"): 1,
        ("gpu", "c"): 1,
        ("cpu", "b"): 1,
        ("cpu", "a"): 1,
    }
    assert values(text, "vllm:lora_adapter_load_duration_ms_count", "source") == {
        "disk": 7,
        "cpu": 5,
    }
    assert values(text, "vllm:lora_requests_by_adapter", "lora_name") == {
        "a": 4,
        "b": 2,
        "c": 1,
        "d": 1,
    }
    assert values(text, "vllm:lora_cache_hits_total", "tier") == {"gpu": 2, "cpu": 3}
    assert values(text, "vllm:lora_cache_misses_total", "tier") == {"gpu": 5, "cpu": 2}
    assert values(text, "vllm:lora_adapter_load_failures_total", "reason") == {
        "gone": 2,
        "invalid": 1,
        "conflict": 0,
        "unreadable": 0,
        "no_memory": 0,
        "timeout": 0,
        "internal": 0,
        "quarantined": 0,
    }
    assert values(text, "vllm:lora_adapters_active") == {(): 2}
    assert values(text, "vllm:lora_slots_free") == {(): 0}
    assert values(text, "vllm:lora_cache_adapters", "tier") == {"gpu": 2, "cpu": 2}
    in_memory = pytest.approx(deployment.bytes_of("b", "d"), rel=0.1)
    assert values(text, "vllm:lora_cache_bytes", "tier") == {"gpu": in_memory, "cpu": in_memory}
    assert values(text, "vllm:lora_adapters_wanted") == {(): 0}
    assert values(text, "vllm:lora_request_wait_seconds_count") == {(): 8}
    waits = values(text, "vllm:lora_request_wait_seconds_bucket", "le")
    # All but those whose adapter was brought for them, and the one whose adapter was gone.
    assert 5 <= waits["0.001"] <= waits["+Inf"] == 8
    steps = values(text, "vllm:lora_batch_adapters_bucket", "le")
    assert steps["0.0"] == NEW_TOKENS  # the base model's
    assert steps["1.0"] == steps["+Inf"] == 8 * NEW_TOKENS
    infos = values(text, "vllm:lora_adapter_info", "lora_name", "tier", "rank", "pinned")
    assert infos == {
        ("a", "disk", "8", "false"): 1,
        ("b", "gpu", "5", "false"): 1,
        ("d", "gpu", "16", "false"): 1,
    }

    listing = deployment.listing()
    rows = {row["id"]: row for row in listing["data"]}
    keys = ("state", "tier", "slot", "rank", "requests", "hits", "pinned")
    assert {name: tuple(row[key] for key in keys) for name, row in rows.items()} == {
        "a": ("failed", "disk", None, 8, 4, 2, False),
        "b": ("slot", "gpu", 1, 5, 2, 0, False),
        "d": ("slot", "gpu", 0, 16, 1, 0, False),
        "e": ("absent", "disk", None, 64, 0, 0, False),
    }
    assert "does not exist" in rows["a"]["last_error"]
    assert (rows["b"]["last_error"], rows["b"]["object"]) == (None, "lora_adapter")
    assert rows["b"]["path"] == str(deployment.root / "b")
    assert time.time() - 60 < rows["d"]["last_used"] < rows["b"]["last_used"] < time.time()
    assert (listing["object"], listing["slots"]) == ("list", {"total": 2, "free": 0})
    assert rows["d"]["bytes"] > rows["b"]["bytes"] > 0
    memory = listing["cpu"]
    assert 0 <= memory.pop("bytes") - rows["b"]["bytes"] - rows["d"]["bytes"] < 2 * PAGE
    assert memory == {"adapters": 2, "bytes_limit": None, "adapters_limit": 3}


def test_the_status_command_shows_what_the_server_lists(
    deployment: Deployment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    arguments = ["status", "--url", deployment.server.url]
    assert main([*arguments, "--json"]) == 0
    data = deployment.listing()["data"]
    assert json.loads(capsys.readouterr().out)["data"] == data
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for row in data:
        line = next(line for line in lines if line.startswith(f"{row['id']} "))
        assert line.split()[1] == row["state"]


def test_all_series_carry_vllms_own_labels_and_stocks_metric_stays(deployment: Deployment) -> None:
    deployment.load("b")
    deployment.ask("b")
    text = scrape(deployment.server)
    for sample in lora_samples(text):
        assert sample.labels["model_name"] == BASE
        by_server = sample.name in {definition.name for definition in defined.TOKENS}
        assert sample.labels.get("engine") == (None if by_server else "0")
    families = {f.name: f for f in text_string_to_metric_families(text)}
    assert families["vllm:lora_requests_info"].samples
    shown = {sample.name for sample in lora_samples(text)}
    simple = {d.name for d in defined.ALL if d.kind is not defined.Kind.HISTOGRAM}
    absent = {defined.ROUTE_REQUESTS, defined.REFUSED, defined.CACHE_BYTES_LIMIT}
    absent |= {defined.TENANT_TOKENS, defined.TENANT_LIMIT, defined.USAGE_LINES_DROPPED}
    absent |= {defined.KERNELS}  # of GPUs
    assert simple - shown == {definition.name for definition in absent}


def test_promtool_reads_a_real_exposition(deployment: Deployment) -> None:
    checked = run_promtool(
        "check", "metrics", text=lines_of_lora_metrics(scrape(deployment.server)) + "\n"
    )
    assert "error while linting" not in checked.stderr


@pytest.mark.smoke("metrics")
def test_lists_of_adapters_with_requests_do_not_pile_up(deployment: Deployment) -> None:
    """The newest one, which routers read, is always there."""
    for name in ("a", "b", "d"):
        deployment.load(name)
        deployment.ask(name)
        families = {f.name: f for f in text_string_to_metric_families(scrape(deployment.server))}
        (shown,) = families["vllm:lora_requests_info"].samples
        assert shown.labels["running_lora_adapters"] in ("", name)
