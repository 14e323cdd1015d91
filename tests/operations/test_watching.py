"""From scrapes to observations: growth, restarts, five-minute windows, several engines."""

import pytest

from vllm_multilora.metrics.label_values import BLENDS, OTHER
from vllm_multilora.toolbox.advice.observations import Observations, SeenAdapter
from vllm_multilora.toolbox.advice.snapshots import Snapshot, parse_exposition
from vllm_multilora.toolbox.advice.watching import observe
from vllm_multilora.toolbox.clients.http_client import UnreachableError

from .exposition import FakeServer


def at(seconds: float, *servers: FakeServer) -> Snapshot:
    return parse_exposition("".join(server.text() for server in servers), seconds)


def test_growth_between_first_and_last_scrape_counts():
    server = FakeServer(slots=6, max_rank=32, requests={"a": 100}, finished=500)
    server.evictions = {"gpu": 7}
    seen = [at(0, server)]
    server.ask("a", 3)
    server.ask("b")  # its series begins within the window
    server.requested = 2
    seen.append(at(10, server))
    server.requested = 0
    server.evictions = {"gpu": 9, "cpu": 1}
    server.loads_ms = [80, 700, 3000]
    server.failures = {"gone": 2}
    seen.append(at(20, server))
    found = observe(seen)
    assert found == Observations(
        window_s=20,
        slots=6,
        model="base",
        max_rank=32,
        active=2,
        peak_requested=2,
        gpu_evictions=2,
        cpu_evictions=1,
        requests={"a": 3, "b": 1},
        finished=4,
        load_times=found.load_times,
        failures={"gone": 2},
    )
    assert found.load_times.total == 3
    assert found.load_times.longer_than(500) == 2
    assert found.load_times.quantile(0.5) == 1000


def test_counters_that_began_anew_count_from_zero():
    server = FakeServer(requests={"a": 100})
    seen = [at(0, server)]
    server.requests = {"a": 4}
    seen.append(at(5, server))
    server.requests = {"a": 6}
    assert observe([*seen, at(10, server)]).requests == {"a": 6}


def test_active_are_those_of_the_busiest_five_minutes():
    server = FakeServer()
    seen = [at(0, server)]
    for minute in range(1, 21):  # another customer every minute
        server.ask(f"customer-{minute}")
        seen.append(at(60 * minute, server))
    found = observe(seen)
    assert found.active == 5
    assert len(found.requests) == 20


def test_host_memory_and_adapters_are_those_of_the_last_scrape():
    server = FakeServer(host_adapters=1, host_bytes=10)
    seen = [at(0, server)]
    server.host_adapters, server.host_bytes, server.host_bytes_limit = 3, 70, 100
    server.adapters = [("a", "gpu", 8, True), ("b", "disk", 16, False)]
    found = observe([*seen, at(1, server)])
    assert (found.host.adapters, found.host.bytes, found.host.bytes_limit) == (3, 70, 100)
    assert found.host.adapters_limit is None
    assert found.adapters == (SeenAdapter("a", 8, "gpu", True), SeenAdapter("b", 16, "disk"))


def test_of_several_engines_the_neediest_decides_about_flags_and_requests_add_up():
    first, second = FakeServer(engine="0"), FakeServer(engine="1")
    seen = [at(0, first, second)]
    for name in ("a", "b", "c"):
        first.ask(name, 2)
    second.ask("a", 5)
    second.evictions = {"gpu": 4}
    first.evictions = {"gpu": 1}
    first.adapters = [("a", "cpu", 8, False)]
    second.adapters = [("a", "gpu", 8, False)]
    found = observe([*seen, at(60, first, second)])
    assert found.active == 3
    assert found.gpu_evictions == 4
    assert found.requests == {"a": 7, "b": 2, "c": 2}
    assert found.adapters == (SeenAdapter("a", 8, "gpu"),)


@pytest.mark.parametrize("label", [OTHER, BLENDS])
def test_names_that_share_a_label_are_known_to_be_missing(label):
    server = FakeServer(loaded=("a", label))
    assert observe([at(0, server), at(1, server)]).names_are_cut
    server.loaded = ("a",)
    server.ask(OTHER)  # an adapter that cannot be had
    assert not observe([at(0, server), at(1, server)]).names_are_cut


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [at(0, FakeServer())],
        [parse_exposition("python_info 1.0\n", 0), parse_exposition("python_info 1.0\n", 1)],
    ],
    ids=["nothing", "one scrape", "another server's metrics"],
)
def test_without_lora_metrics_nothing_can_be_reported(seen):
    with pytest.raises(UnreachableError, match="vllm:lora_slots"):
        observe(seen)


def test_what_is_no_exposition_is_said_to_be_none():
    with pytest.raises(UnreachableError, match="did not answer in Prometheus's text format"):
        parse_exposition('{"error": "not found"}', 0)
