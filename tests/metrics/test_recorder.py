"""Recording: bounded in names and in bytes, and never in the way."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from vllm_multilora.metering.usage_log import Usage
from vllm_multilora.metrics import definitions as defined
from vllm_multilora.metrics.definitions import TIERS, AdapterInfo
from vllm_multilora.metrics.label_values import IDLE_S, OTHER, BoundedNames
from vllm_multilora.metrics.recorder import Recorder
from vllm_multilora.metrics.series_file import ProcessStamp, SeriesFile, SeriesFileFullError
from vllm_multilora.metrics.server_counts import ServerCounts
from vllm_multilora.metrics.value_folder import locked

from .readings import recorder, shown


def bounded(limit: int, clock: Callable[[], float] = time.monotonic) -> BoundedNames:
    return BoundedNames(limit, lambda _: True, clock)


def test_the_first_adapters_have_labels_of_their_own() -> None:
    names = bounded(2)
    for name in ("a", "b", "c"):
        names.admit(name)
    assert [names.label(n) for n in ("a", "b", "c", "a", "c", "b")] == [
        *("a", "b", OTHER),
        *("a", OTHER, "b"),
    ]
    nobody = bounded(0)
    nobody.admit("a")
    assert nobody.label("a") == OTHER


def test_who_has_not_been_counted_for_a_day_gives_way_and_who_longest_has_not_first() -> None:
    now = 0.0
    names = bounded(2, lambda: now)
    names.admit("a")
    names.admit("b")
    now = 1.0
    assert names.label("a") == "a"
    now = IDLE_S
    names.admit("c")
    names.admit("d")
    assert [names.label(name) for name in "abcd"] == ["a", OTHER, "c", OTHER]


def test_whoever_comes_and_goes_all_day_gets_no_more_places_than_there_are() -> None:
    now = 0.0
    names = bounded(100, lambda: now)
    had = set()
    for number in range(20_000):
        now += IDLE_S / 10_000
        names.admit(f"{number}")
        had |= {f"{number}"} if names.has(f"{number}") else set()
    assert 100 < len(had) <= 200


def test_the_name_of_all_others_is_nobodys() -> None:
    names = bounded(1)
    names.admit(OTHER)
    assert not names.has(OTHER)


def test_names_that_are_only_asked_for_take_no_place() -> None:
    names = bounded(1)
    assert {names.label(f"junk-{number}") for number in range(1000)} == {OTHER}
    names.admit("acme")
    assert names.label("acme") == "acme"


@pytest.mark.parametrize("name", ["x" * 256, "a\nb", "\x1b[31m", "\ud800"], ids=ascii)
def test_a_name_that_is_long_or_cannot_be_printed_is_no_label(name: str) -> None:
    names = bounded(1)
    names.admit(name)
    assert names.label(name) == OTHER


def test_a_name_that_gives_way_takes_all_of_its_series_along_and_begins_again_at_0(
    tmp_path: Path,
) -> None:
    now = 0.0
    record = recorder(tmp_path, most=1, has_latencies=True, clock=lambda: now)

    def count(name: str) -> dict[str, float]:
        record.names.admit(name)
        label = record.names.label(name)
        record.series(defined.LOADS, "disk", label).inc()
        record.series(defined.ROUTE_REQUESTS, "route", label, "chosen").inc()
        record.histogram(defined.FIRST_TOKEN, label).observe(0.07)
        return {name: value for name, value in shown(tmp_path).items() if value}

    first = count("a")
    of_a = count("a")
    assert count("b").items() >= of_a.items()
    now += IDLE_S
    late = record.series(defined.LOADS, "disk", "a")
    found = count("b")
    late.inc()  # has no place any more
    assert shown(tmp_path).items() >= found.items()
    assert not [name for name in shown(tmp_path) if "lora_name=a" in name]
    assert found["vllm:lora_adapter_load_total{engine=0,lora_name=__other__,source=disk}"] == 1
    now += IDLE_S
    assert count("a").items() >= first.items()


def test_names_that_come_for_years_fill_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    record = recorder(tmp_path, "server", most=3, clock=lambda: now)
    for number in range(200):
        now += IDLE_S / 2
        name = f"{number}".rjust(255, "x")
        record.names.admit(name)
        assert record.names.label(name) == name
        for definition in defined.TOKENS:
            record.series(definition, name, "", "").inc()
    found = [name for name in shown(tmp_path) if name.startswith(defined.PROMPT_TOKENS.name)]
    assert len(found) == 3
    assert not caplog.records
    assert len(list(tmp_path.glob("*.series"))) == 1


def test_what_several_servers_have_counted_falls_only_when_the_last_of_them_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def server(number: int) -> Recorder:
        stamp = ProcessStamp(1, number, 1)
        monkeypatch.setattr(ProcessStamp, "own", lambda: stamp)
        return recorder(tmp_path, "server", engine="", most=1, clock=lambda: now)

    def count(record: Recorder, name: str, requests: int = 1) -> float | None:
        record.names.admit(name)
        series = record.series(defined.REQUESTS, record.names.label(name))
        series.inc(requests)
        return shown(tmp_path).get(f"{defined.REQUESTS.name}{{lora_name=acme}}")

    one, two = server(1), server(2)
    count(one, "acme", 7)
    assert count(two, "acme", 5) == 12
    now += IDLE_S
    assert count(one, "new") == 12
    assert count(two, "acme") == 13
    now += IDLE_S
    assert count(one, "acme") == 14
    now += IDLE_S
    assert count(two, "newer") == 14
    assert count(one, "newest") is None
    now += IDLE_S
    assert count(one, "acme") == 1


@pytest.mark.parametrize("seed", range(2))
def test_prometheus_sees_no_more_tokens_than_several_servers_have_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Nor fewer, but where a series is back with more than it had when it went."""
    random, now = Random(seed), 0.0
    servers = []
    for number in range(3):
        stamp = ProcessStamp(1, number + 1, 1)
        monkeypatch.setattr(ProcessStamp, "own", lambda stamp=stamp: stamp)
        made = recorder(tmp_path, "server", engine="", most=2, clock=lambda: now)
        servers.append(ServerCounts())
        servers[-1].start(lambda made=made: made)
    last: dict[str, float] = {}
    gone: dict[str, float] = {}
    for _ in range(120):
        now += random.choice((0.0, 10.0, IDLE_S / 2, IDLE_S))
        user = {"adapter": random.choice("abcdef"), "tenant": random.choice(("", "t", "u"))}
        tokens = random.randint(1, 9)
        random.choice(servers).count_tokens(Usage("id", prompt_tokens=tokens, **user))
        name = defined.PROMPT_TOKENS.name
        found = {key: value for key, value in shown(tmp_path).items() if key.startswith(name)}
        before = gone | last
        increase = sum(
            value - before.get(key, 0) if value >= before.get(key, 0) else value
            for key, value in found.items()
        )
        is_back = any(key in gone for key in found)
        assert increase <= tokens if is_back else increase == tokens
        gone = {key: value for key, value in before.items() if key not in found}
        last = found


def test_without_room_for_a_new_file_places_are_kept_and_tried_for_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 0.0
    record = recorder(tmp_path, most=1, clock=lambda: now)
    record.names.admit("a")
    record.series(defined.REQUESTS, "a").inc()
    now += IDLE_S

    def full(*_: object) -> None:
        raise OSError("no room")

    with locked(tmp_path, exclusively=False):  # as somebody does who reads
        record.names.admit("b")
    assert not caplog.records
    now += 60.0
    with monkeypatch.context() as patched:
        patched.setattr("os.posix_fallocate", full)
        for _ in range(5):
            record.names.admit("b")
    assert len(caplog.records) == 1
    record.names.admit("b")
    assert not record.names.has("b")
    assert list(shown(tmp_path)) == ["vllm:lora_requests_by_adapter{engine=0,lora_name=a}"]
    now += 60.0
    record.names.admit("b")
    assert record.names.has("b")
    assert shown(tmp_path) == {}


def test_whose_file_was_deleted_goes_on(tmp_path: Path) -> None:
    """As what cleans up temporary folders may do."""
    now = 0.0
    record = recorder(tmp_path, most=1, clock=lambda: now)
    record.names.admit("a")
    (path,) = tmp_path.glob("*.series")
    path.unlink()
    now += IDLE_S
    record.names.admit("b")
    record.series(defined.REQUESTS, record.names.label("b")).inc()
    assert not record.names.has("b")


def test_a_file_has_room_for_all_series_of_its_adapters(tmp_path: Path) -> None:
    record = recorder(tmp_path, "server", most=200, has_latencies=True)  # counts most
    for definition in defined.ALL:
        for number in range(201) if "lora_name" in definition.labels else (0,):
            values = [
                f"customer-{number:08d}" if label == "lora_name" else "unreadable"
                for label in definition.labels
            ]
            if definition.kind is defined.Kind.HISTOGRAM:
                record.histogram(definition, *values).observe(1.0)
            elif definition is not defined.INFO:
                record.series(definition, *values).inc()
    requests = [name for name in shown(tmp_path) if name.startswith(defined.REQUESTS.name)]
    assert len(requests) == 201


@pytest.mark.parametrize(
    "letters", ["я" * 126, '"' * 252, "\\" * 252], ids=["cyrillic", "quotes", "backslashes"]
)
def test_a_file_has_room_for_names_in_any_script(tmp_path: Path, letters: str) -> None:
    record = recorder(tmp_path, most=200)
    for number in range(200):
        name = f"{number:03}{letters}"  # no name may be longer
        record.names.admit(name)
        label = record.names.label(name)
        assert label == name
        for definition in (defined.LOADS, defined.EVICTIONS):
            record.series(definition, "disk", label).inc()
            record.series(definition, "cpu", label).inc()
        record.series(defined.REQUESTS, label).inc()
    requests = [name for name in shown(tmp_path) if name.startswith(defined.REQUESTS.name)]
    assert len(requests) == 200


def test_a_full_file_takes_no_more_series_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = recorder(tmp_path, most=0)
    with caplog.at_level(logging.WARNING):
        for number in range(2_000):
            record.series_at((defined.REQUESTS.name, f"{number}" * 20)).inc()
    found = shown(tmp_path)
    assert 0 < len(found) < 2_000
    assert set(found.values()) == {1.0}
    assert len(caplog.records) == 1
    assert {path.stat().st_size for path in tmp_path.glob("*.series")} == {(1 << 16) + 6 * 384}


def test_a_file_that_exists_is_not_written_over(tmp_path: Path) -> None:
    first = recorder(tmp_path)
    first.series(defined.ACTIVE).set(3)
    with pytest.raises(FileExistsError, match="already"):
        recorder(tmp_path)
    assert shown(tmp_path) == {"vllm:lora_adapters_active{engine=0}": 3}


def test_a_key_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = SeriesFile(tmp_path / "f.series", 100)
    file.cell(("short",))
    with pytest.raises(SeriesFileFullError):
        file.cell(("a key that is far longer than the room that is left for it",))
    assert file.cell(("short",)) == "short"


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("rank", [0, 1, 8, 100_000])
@pytest.mark.parametrize("pinned", [False, True])
def test_an_info_survives_being_a_number(tier: str, rank: int, pinned: bool) -> None:
    info = AdapterInfo(tier, rank, pinned)
    assert AdapterInfo.decode(info.encode()) == info
    assert AdapterInfo.decode(0.0) is None


def test_routes_are_counted_from_the_start_of_metrics_on(tmp_path: Path) -> None:
    def make() -> Recorder:
        return recorder(tmp_path, "server", engine="")

    counts = ServerCounts()
    counts.count_route("assistant", "v2", "share")  # metrics are off: nothing happens
    counts.start(make)
    assert list(tmp_path.iterdir()) == []  # a file comes with the first count
    for _ in range(2):
        counts.count_route("assistant", "v2", "share")
    assert shown(tmp_path) == {
        "vllm:lora_route_requests_total{lora_name=v2,reason=share,route=assistant}": 2
    }


def test_more_routes_than_there_is_room_for_are_counted_together_and_cost_no_tokens(
    tmp_path: Path,
) -> None:
    counts = ServerCounts()
    counts.start(lambda: recorder(tmp_path, "server", engine="", most=2))
    for number in range(3_000):
        counts.count_route(f"customer-{number}", "v1", "chosen")
        counts.count_route(f"customer-{number}", "v1", "fallback")
    counts.count_tokens(Usage("id", adapter="v1", route="customer-0", prompt_tokens=10))
    found = shown(tmp_path)
    routes = {k: v for k, v in found.items() if k.startswith(defined.ROUTE_REQUESTS.name)}
    assert len(routes) <= 2 * 2 + 2
    assert sum(routes.values()) == 6_000
    assert found["vllm:lora_prompt_tokens_total{lora_name=v1,route=customer-0,tenant=}"] == 10


@pytest.mark.parametrize("route", ["\ud800", "a\nb", "x" * 256], ids=ascii)
def test_a_route_that_no_label_can_name_keeps_nothing_else_from_being_shown(
    tmp_path: Path, route: str
) -> None:
    counts = ServerCounts()
    counts.start(lambda: recorder(tmp_path, "server", engine=""))
    counts.count_route(route, "v1", "chosen")
    counts.count_tokens(Usage("id", adapter="v1", route=route, prompt_tokens=10))
    found = shown(tmp_path)
    assert "".join(found).isprintable()
    assert found[f"vllm:lora_prompt_tokens_total{{lora_name=v1,route={OTHER},tenant=}}"] == 10


def test_tokens_are_counted_by_user_and_those_of_too_many_users_together(tmp_path: Path) -> None:
    counts = ServerCounts()
    counts.start(lambda: recorder(tmp_path, "server", engine="", most=2))
    for number in range(8):
        user = {"adapter": f"a{number % 2}", "route": f"r{number}" if number else None}
        counts.count_tokens(
            Usage("id", prompt_tokens=10, cached_tokens=4, generated_tokens=1, **user)
        )
    found = shown(tmp_path)
    own = [key for key in found if "lora_prompt_tokens" in key and "__other__" not in key]
    assert len(own) == 4
    assert found["vllm:lora_prompt_tokens_total{lora_name=a0,route=,tenant=}"] == 10
    for kind, tokens in (("prompt", 80), ("cached_prompt", 32), ("generation", 8)):
        name = f"vllm:lora_{kind}_tokens_total{{"
        assert sum(value for key, value in found.items() if key.startswith(name)) == tokens


def test_who_uses_tokens_today_has_the_place_of_who_did_in_the_past(tmp_path: Path) -> None:
    now = 0.0
    counts = ServerCounts()
    counts.start(lambda: recorder(tmp_path, "server", engine="", most=1, clock=lambda: now))
    for day in range(5):
        for number in range(2):
            tenant = f"{day}-{number}"
            counts.count_tokens(Usage("id", adapter="base", tenant=tenant, prompt_tokens=1))
            counts.count_refused(tenant, 429)
            counts.count_route(tenant, "base", "chosen")
        now += IDLE_S
    for of in ("prompt_tokens_total", "refused_requests_total", "route_requests_total"):
        found = [name for name in shown(tmp_path) if f"lora_{of}" in name]
        assert len([name for name in found if "=4-" in name]) == 2
        assert len(found) <= 4


def test_a_request_does_not_fail_for_being_counted(caplog: pytest.LogCaptureFixture) -> None:
    counts = ServerCounts()

    def make() -> Recorder:
        raise OSError("no room")

    counts.start(make)
    counts.count_route("assistant", "v2", "chosen")
    counts.count_route("assistant", "v2", "chosen")  # the place was tried once
    assert "could not be counted" in caplog.text


def test_a_server_counts_from_when_there_is_room_for_it_on(tmp_path: Path) -> None:
    now, has_room, tries = 0.0, False, []

    def make() -> Recorder | None:
        tries.append(now)
        return recorder(tmp_path, "server", engine="") if has_room else None

    counts = ServerCounts(lambda: now)
    counts.start(make)
    for _ in range(3):
        counts.count_refused("acme", 429)
    assert tries == [0.0]
    now, has_room = 60.0, True
    for _ in range(3):
        counts.count_refused("acme", 429)
    assert shown(tmp_path) == {f"{defined.REFUSED.name}{{status=429,tenant=acme}}": 3}


def test_a_tenants_tokens_are_shown_beside_its_limit(tmp_path: Path) -> None:
    counts = ServerCounts()
    counts.start(lambda: recorder(tmp_path, "server", engine="", most=1))
    for limit in (6000.0, 9000.0):
        counts.count_limited("acme", 20, limit)
    for number in range(8):
        counts.count_limited(f"t{number}", 1, 10.0)
    found = shown(tmp_path)
    assert found[f"{defined.TENANT_TOKENS.name}{{tenant=acme}}"] == 40
    assert found[f"{defined.TENANT_LIMIT.name}{{tenant=acme}}"] == 9000
    assert len(found) == 4, "there is room for two tenants"


def test_lines_that_the_usage_log_lacks_are_counted(tmp_path: Path) -> None:
    counts = ServerCounts()
    counts.start(lambda: recorder(tmp_path, "server", engine=""))
    counts.count_dropped(3)
    counts.count_dropped(4)
    assert shown(tmp_path) == {f"{defined.USAGE_LINES_DROPPED.name}{{}}": 7}


def test_refusals_are_counted_by_tenant_and_those_of_too_many_together(tmp_path: Path) -> None:
    counts = ServerCounts()
    counts.count_refused("acme", 404)  # metrics are off: nothing happens
    counts.start(lambda: recorder(tmp_path, "server", engine="", most=2))
    for status in (401, 403, 404, 429):
        counts.count_refused(None, status)
    for number in range(1000):
        counts.count_refused(f"t{number}", 429)
        counts.count_refused("acme", 404)
    found = {k: v for k, v in shown(tmp_path).items() if k.startswith(defined.REFUSED.name)}
    assert len(found) <= 10
    assert sum(found.values()) == 2004
    assert found[f"{defined.REFUSED.name}{{status=401,tenant=}}"] == 1
    assert found[f"{defined.REFUSED.name}{{status=429,tenant={OTHER}}}"] > 900
