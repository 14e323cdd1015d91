"""`vllm-multilora advise` against a server and against a Prometheus, both made of paper."""

import itertools
import json
import math
import re
import time
from collections.abc import Sequence

import pytest

from vllm_multilora.cli import main
from vllm_multilora.toolbox.advice.snapshots import NAMES, REQUESTED, Snapshot, parse_exposition

from .conftest import Answer, Site
from .exposition import FakeServer


def busy_server(site: Site) -> FakeServer:
    """A server with two slots, asked for another customer at every scrape."""
    server = FakeServer(slots=2, requested=3)

    def metrics(*_: object) -> tuple[int, str]:
        server.ask(f"customer-{len(server.requests)}")
        server.evictions = {"gpu": len(server.requests)}
        return 200, server.text()

    site.answers["/metrics"] = metrics
    return server


def test_a_server_that_needs_more_slots(site, capsys):
    server = busy_server(site)
    assert main(["advise", "--url", site.url + "/", "--window", "0.5"]) == 1
    out = capsys.readouterr().out
    # A busy machine scrapes less often. The first customer's request was before the window.
    came = len(server.requests) - 1
    needed = max(math.ceil(came * 1.2), server.requested + 2)
    assert out.startswith(f"max-loras-low: raise --max-loras from 2 to {needed}\n")
    assert "rule  max_loras = adapters active within 5 minutes + 20 %" in out


def test_a_healthy_server(site, capsys):
    server = FakeServer(slots=4, requests={"a": 5}, adapters=[("a", "gpu", 16, False)])
    site.answers["/metrics"] = lambda *_: (200, server.text())
    assert main(["advise", "--url", site.url, "--window", "0.3"]) == 0
    reported = (
        r"Nothing to change: 0 requests in (\d+) s, 0 adapters active within \1 s, 0 at the same "
        r"time, 4 slots\.\n"
    )
    assert re.fullmatch(reported, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("ranks", "codes"),
    [([16, 8], ["max-rank-high"]), ([16, None], []), (None, [])],
    ids=["all read", "one unread", "no list"],
)
def test_a_lower_rank_is_advised_once_all_adapters_are_read(site, capsys, ranks, codes):
    server = FakeServer(
        slots=4, max_rank=64, requests={"a": 5}, adapters=[("a", "gpu", 16, False)], loaded=["a"]
    )
    site.answers["/metrics"] = lambda *_: (200, server.text())
    if ranks is not None:
        listing = {"data": [{"id": "ab"[n], "rank": rank} for n, rank in enumerate(ranks)]}
        site.answers["/v1/lora_adapters"] = lambda *_: (200, json.dumps(listing))
    assert main(["advise", "--url", site.url, "--window", "0.3", "--json"]) == bool(codes)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [finding["code"] for finding in findings] == codes


def test_a_clock_that_is_set_back_meanwhile(site, capsys, monkeypatch):
    busy_server(site)
    set_back = itertools.count(time.time(), -60)
    monkeypatch.setattr("time.time", lambda: next(set_back))
    assert main(["advise", "--url", site.url, "--window", "0.3", "--json"]) == 1
    assert 0.3 <= json.loads(capsys.readouterr().out)["window_s"] < 60


def as_prometheus(seen: Sequence[Snapshot], query: dict[str, str]) -> str:
    """What Prometheus would answer to a range query, had it scraped the snapshots."""
    peaks = re.match(r"max_over_time\((\S+)\{", query["query"])
    requested = {peaks[1]} if peaks else NAMES - {REQUESTED}
    step, start = float(query["step"]), float(query["start"])
    assert start + step * (len(seen) - 1) <= float(query["end"])
    rows: dict[object, dict] = {}
    for index, snap in enumerate(seen):
        for series, value in snap.samples.items():
            if series.name not in requested:
                continue
            labels = dict(series.labels) | {"job": "vllm", "instance": "gpu7:8000"}
            if not peaks:  # functions drop the name
                labels["__name__"] = series.name
            row = rows.setdefault(series, {"metric": labels, "values": []})
            row["values"].append([start + index * step, str(value)])
    return json.dumps({"status": "success", "data": {"result": list(rows.values())}})


@pytest.fixture
def prometheus(site) -> Site:
    # It may have adapters of a higher rank that nobody has asked for: its metrics do not say.
    server = FakeServer(slots=2, max_rank=64, adapters=[("a", "gpu", 16, False)], loaded=["a"])
    seen = []
    for index in range(21):  # 300 s in steps of 15
        server.ask(f"customer-{index % 5}")
        server.requested = index % 5
        server.evictions = {"gpu": 40 * index}
        seen.append(parse_exposition(server.text(), 0))
    queries = []

    def answer(query: dict[str, str], headers: dict[str, str]) -> tuple[int, str]:
        assert "Authorization" not in headers  # which is for the server alone
        queries.append(query["query"])
        return 200, as_prometheus(seen, query)

    site.answers["/api/v1/query_range"] = answer
    site.queries = queries
    return site


def test_a_past_window_of_prometheus(prometheus, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert main(["advise", "--prometheus", prometheus.url, "--match", 'job="vllm"', "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["window_s"] == 300
    assert found["active"] == 5
    assert found["peak_requested"] == 4
    assert found["requests"] == 20
    [finding] = found["findings"]
    assert finding["change"] == "raise --max-loras from 2 to 6"
    assert "2.67 adapters a second" in finding["seen"]
    assert all('job="vllm"' in query for query in prometheus.queries)


def test_a_prometheus_that_has_just_begun(site, capsys):
    """A day's steps are 150 s apart, and it has watched for one minute of the day."""
    server = FakeServer(slots=2, requests={"a": 5}, adapters=[("a", "gpu", 16, False)])
    snap = parse_exposition(server.text(), 0)
    begun = time.time() - 60

    def answer(query: dict[str, str], _: dict[str, str]) -> Answer:
        step, start = float(query["step"]), float(query["start"])
        steps = range(math.floor((float(query["end"]) - start) / step) + 1)
        seen = [snap if start + step * i > begun else Snapshot(0, {}) for i in steps]
        return 200, as_prometheus(seen, query)

    site.answers["/api/v1/query_range"] = answer
    command = ["advise", "--prometheus", site.url, "--window", "86400", "--json"]
    assert main(command) == 0
    assert 15 <= json.loads(capsys.readouterr().out)["window_s"] <= 60


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, '{"status": "success"}'), "does not answer like Prometheus: {'status': 'success'}"),
        ((200, '{"status": "success", "data": null}'), "does not answer like Prometheus"),
        ((200, '{"data": {"result": [{"metric": {}}]}}'), "does not answer like Prometheus"),
        ((200, '{"data": {"result": [0, "1"]}}'), "does not answer like Prometheus"),
        ((200, '{"status": "error", "error": "busy"}'), "'error': 'busy'"),
        ((400, '{"status": "error", "error": "1:9:\\nno"}'), "/query_range answers 400: 1:9: no\n"),
        ((502, "<html>\n<h1>Bad Gateway</h1>"), "answers 502: <html> <h1>Bad Gateway</h1>\n"),
        ((200, "<html>"), "did not answer with JSON: '<html>'"),
        (
            (200, '{"status": "success", "data": {"result": []}}'),
            "found 'vllm:lora_slots' less than twice",
        ),
    ],
    ids=["no data", "null", "no values", "scalar", "error", "refused", "proxy", "page", "nothing"],
)
def test_a_prometheus_that_has_no_answer(site, answer, message, capsys):
    site.answers["/api/v1/query_range"] = lambda *_: answer
    assert main(["advise", "--prometheus", site.url]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_server_without_the_plugin(site, capsys):
    site.answers["/metrics"] = lambda *_: (200, "python_info 1.0\n")
    assert main(["advise", "--url", site.url, "--window", "0.2"]) == 2
    assert "is this a vLLM server with vllm-multilora and --enable-lora" in capsys.readouterr().err
