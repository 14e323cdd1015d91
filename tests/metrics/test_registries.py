"""Where the LoRA metrics are shown when values of several processes are kept in files."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Gauge
from vllm.entrypoints.serve.instrumentator import register_instrumentator_api_routers

from vllm_multilora.gateway.app import add_routes
from vllm_multilora.integration.api_server.failure_delivery import AFTER_OUTPUTS
from vllm_multilora.integration.server.requests import metrics_route
from vllm_multilora.metrics import definitions as defined

from .readings import recorder

SLOTS, MULTIPROCESS = defined.SLOTS.name, "PROMETHEUS_MULTIPROC_DIR"

# A host that imports prometheus_client first, keeps its own registry, and serves it itself.
HOST = """
import os, sys
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from vllm_multilora import plugin
plugin.register()
from tests.metrics.test_registries import show_slots
show_slots(sys.argv[1])
MultiProcessCollector(REGISTRY)
other = CollectorRegistry()
MultiProcessCollector(other)
for registry in REGISTRY, other:
    sys.stdout.write(generate_latest(registry).decode())
"""


def show_slots(folder: str) -> None:
    """Has this process show an engine that has recorded its number of slots."""
    engine = Path(folder) / "engine"
    engine.mkdir()
    recorder(engine).series(defined.SLOTS).set(2)
    config: Any = type("Config", (), {"instance_id": "an engine"})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(metrics_route.FOLDER_VARIABLE, str(engine))
        patch.setattr(metrics_route, "manages_adapters", lambda config: True)
        metrics_route.show(config)


def series(text: str) -> Counter[str]:
    """The series of the number of slots, each with how often it is there."""
    return Counter(line for line in text.splitlines() if line.startswith(SLOTS + "{"))


def test_a_host_with_a_registry_of_its_own_shows_each_series_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(series(done.stdout).values()) == [1]


@pytest.mark.parametrize("path", ["/metrics", "/metrics/"])
def test_one_of_several_api_servers_shows_each_series_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv(MULTIPROCESS, str(tmp_path))
    show_slots(str(tmp_path))
    app = FastAPI()
    register_instrumentator_api_routers(app)
    add_routes(app, access=None)
    answer = TestClient(app).get(path)
    assert list(series(answer.text).values()) == [1]


def test_one_of_several_api_servers_shows_ours_in_the_place_of_a_metric_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MULTIPROCESS, str(tmp_path))
    stock = CollectorRegistry()
    Gauge(SLOTS, "vLLM's own", ["engine"], registry=stock).labels("7").set(1)
    Gauge("vllm:another", "vLLM's own", registry=stock).set(3)
    monkeypatch.setattr(metrics_route, "get_prometheus_registry", lambda: stock)
    show_slots(str(tmp_path))
    app = FastAPI()
    add_routes(app, access=None)
    text = TestClient(app).get("/metrics").text
    assert 'engine="7"' not in text
    assert list(series(text).values()) == [1]
    assert "vllm:another 3.0" in text


def test_vllms_lists_of_adapters_are_emptied_after_each_step(tmp_path: Path) -> None:
    show_slots(str(tmp_path))
    lists = {"acme": 1}
    processor = SimpleNamespace(lora_states=SimpleNamespace(requests=lists))
    gauge = Gauge("vllm:lists", "vLLM's own", registry=CollectorRegistry())
    stats = [SimpleNamespace(gauge_lora_info=gauge), SimpleNamespace()]
    client = SimpleNamespace(
        logger_manager=SimpleNamespace(stat_loggers=stats), output_processor=processor
    )

    metrics_route.hide_stock_lists(client)
    empty = AFTER_OUTPUTS.get(processor)
    assert empty is not None
    empty()
    assert lists == {}
