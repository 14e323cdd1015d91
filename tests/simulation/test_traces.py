"""Traces and sizes: from files, with errors that name the line, and made up."""

import json
from collections import Counter
from dataclasses import replace

import pytest

from vllm_multilora.errors import ConfigError
from vllm_multilora.slots.simulation.adapter_sizes import parse_rank_mix, read_sizes, sizes_by_rank
from vllm_multilora.slots.simulation.synthetic_traces import KINDS, Traffic, synthetic_trace
from vllm_multilora.slots.simulation.traces import (
    TimedRequest,
    Trace,
    TraceError,
    read_timed_trace,
    read_trace,
)

MIB = 2**20


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "adapter,time,bytes\nb,2.5,\na,1,100\na,3,100\nc,2.5,\n"),
        (
            "t.jsonl",
            '{"time": 2.5, "adapter": "b"}\n\n{"time": 1, "adapter": "a", "bytes": 100}\n'
            '{"time": 3, "adapter": "a", "bytes": 100}\n{"time": 2.5, "adapter": "c"}\n',
        ),
    ],
    ids=["csv", "jsonl"],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
def test_requests_are_read_in_order_of_time(write, name, text, mark):
    trace = read_trace(write(name, mark + text))
    assert trace == Trace(("a", "b", "c", "a"), {"a": 100})
    assert trace.adapters == ("a", "b", "c")


def test_a_timed_trace_says_how_much_is_asked_for_and_serves_simulate_too(write):
    path = write(
        "t.csv",
        "time,adapter,prompt_tokens,generation_tokens,bytes\n0.5,a,10,3,100\n0.5,b,20,1,\n",
    )
    trace = read_timed_trace(path)
    assert trace.requests == (TimedRequest(0.5, "a", 10, 3), TimedRequest(0.5, "b", 20, 1))
    assert trace.sizes == {"a": 100}
    assert read_trace(path) == Trace(("a", "b"), {"a": 100})


def logged(time, adapter, prompt, generation, status="ok"):
    row = {"time": time, "adapter": adapter, "status": status}
    return json.dumps(row | {"prompt_tokens": prompt, "generation_tokens": generation})


LOG = "\n".join(
    [
        logged("2026-01-31T12:00:00.500Z", "b", 8, 2),
        '{"time":"2026-01-31T12:00:01.000Z","dropped":3}',
        logged("2026-01-31T12:00:01.000Z", None, 9, 1),
        logged("2026-01-31T12:00:02.000Z", "a", 0, 0, "failed"),
        '{"time":"2026-01-31T12:00:02.125Z","requ',
        logged("2026-01-31T12:00:02.250Z", "a", 7, 4),
    ]
)


def test_a_usage_log_is_a_trace_of_what_was_answered(write):
    path = write("usage.jsonl", LOG)
    assert read_trace(path) == Trace(("b", "a"))
    noon = 1769860800
    assert read_timed_trace(path).requests == (
        TimedRequest(noon + 0.5, "b", 8, 2),
        TimedRequest(noon + 1.0, None, 9, 1),
        TimedRequest(noon + 2.25, "a", 7, 4),
    )
    with pytest.raises(TraceError, match="contains no requests for adapters"):
        read_trace(write("base.jsonl", LOG.splitlines()[2]))
    with pytest.raises(TraceError, match=r"line 1: time must be .* got 'noon'"):
        read_trace(write("wrong.jsonl", LOG.replace("2026-01-31T12:00:00.500Z", "noon")))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "when,adapter\n", "t.csv, line 1: the header lacks time .found: when, adapter"),
        ("t.csv", "", "t.csv, line 1: the header lacks time and adapter .found: nothing"),
        ("t.csv", "time,adapter\n", "t.csv: contains no requests"),
        ("t.csv", "time,adapter\n1,a\nsoon,b\n", "t.csv, line 3: time .* number, got 'soon'"),
        ("t.csv", "time,adapter\n1,a\nnan,b\n", "t.csv, line 3: time must be a finite number"),
        ("t.csv", "time,adapter\n1,a\n2,\n", "t.csv, line 3: adapter must be a name, got ''"),
        ("t.csv", "time,adapter\n1,a\n2\n", "t.csv, line 3: adapter must be a name, got None"),
        ("t.csv", "time,adapter,bytes\n1,a,-5\n", "t.csv, line 2: bytes must be a positive in"),
        ("t.csv", "time,adapter,bytes\n1,a,5\n2,a,6\n", "line 3: adapter 'a' has 6 bytes .* 5 bef"),
        ("t.jsonl", '{"time": 1, "adapter": "a"}\n{"time"\n', "t.jsonl, line 2: invalid JSON"),
        ("t.jsonl", f"{list(range(10**5))}\n", r"got \[0, 1, 2, 3, 4, 5, \.\.\.\]$"),
        ("t.jsonl", '{"time": 1, "adapter": %s}\n' % ([1] * 10**5), r"got \[1, 1, .*\.\.\.\]$"),
        ("t.jsonl", "[1]\n", r"t.jsonl, line 1: expected a JSON object, got \[1\]"),
        ("t.jsonl", '{"time": true, "adapter": "a"}\n', "line 1: time must be .* got True"),
        ("t.jsonl", '{"time": 1, "adapter": 7}\n', "line 1: adapter must be a name, got 7"),
        ("t.jsonl", '{"time": 1, "adapter": "a", "bytes": 1.5}\n', "positive integer, got 1.5"),
        (
            "t.jsonl",
            '{"time": 1%s, "adapter": "a"}\n' % ("0" * 400),
            "line 1: time .* number, got 10",
        ),
        ("t.jsonl", '{"time": 1%s, "adapter": "a"}\n' % ("0" * 5000), "line 1: .* too many digits"),
        ("t.jsonl", "[" * 100_000, "line 1: .* too deep nesting"),
        ("t.csv", f"time,adapter,bytes\n1,a,{'9' * 400}\n", r"line 2: bytes must be below 2\^63"),
        ("t.txt", "", "t.txt: a trace must end in .csv, .jsonl or .ndjson"),
    ],
)
def test_a_wrong_line_is_named(write, name, text, message):
    with pytest.raises(TraceError, match=message):
        read_trace(write(name, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TraceError, match=r"none.csv: cannot be read: .*No such file"):
        read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_traffic_is_the_same_for_the_same_seed(kind):
    traffic = Traffic(requests=500, adapters=20, seed=3)
    trace = synthetic_trace(kind, traffic)
    assert trace == synthetic_trace(kind, traffic)
    assert trace != synthetic_trace(kind, replace(traffic, seed=4))
    assert len(trace.requests) == 500
    assert set(trace.adapters) <= {f"adapter-{rank:04d}" for rank in range(1, 21)}


def test_zipf_asks_for_the_second_half_as_often_as_the_first():
    counts = Counter(synthetic_trace("zipf", Traffic(requests=50_000, adapters=10)).requests)
    harmonic = sum(1 / rank for rank in range(1, 11))
    for rank in (1, 2, 10):
        expected = 50_000 / rank / harmonic
        assert counts[f"adapter-{rank:04d}"] == pytest.approx(expected, rel=0.05)


def test_a_scan_passes_over_every_adapter_in_turn():
    trace = synthetic_trace("scan", Traffic(requests=300, adapters=50, scan_every=100))
    assert list(trace.requests[100:150]) == [f"adapter-{rank:04d}" for rank in range(1, 51)]
    assert trace.requests[250:300] == trace.requests[100:150]


def test_bursts_are_runs_of_one_adapter_each():
    traffic = Traffic(requests=5_000, adapters=1_000, burst_length=100, zipf_exponent=0)
    requests = synthetic_trace("bursts", traffic).requests
    top = Counter(requests[:50]).most_common(1)[0][1]
    assert top >= 10
    assert Counter(requests).most_common(1)[0][1] < 1_000


def test_by_day_other_adapters_are_busy_than_by_night():
    trace = synthetic_trace("daily", Traffic(requests=7_200, adapters=20, zipf_exponent=0))
    hours = [Counter(trace.requests[i : i + 100]) for i in range(0, 7_200, 100)]

    def overlap(one, other):
        return sum((one & other).values())

    assert overlap(hours[0], hours[24]) > 2 * overlap(hours[0], hours[12])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": 0}, "requests must be at least 1 and at most 10000000, got 0"),
        ({"requests": 10**15}, "at most 10000000, got 1000000000000000"),
        ({"adapters": -1}, "adapters must be at least 1 .* got -1"),
        ({"adapters": 10**12}, "at most 10000000, got 1000000000000"),
        ({"zipf_exponent": -0.1}, "zipf_exponent must be 0 or more, at most 10, got -0.1"),
        ({"zipf_exponent": float("nan")}, "zipf_exponent must be 0 or more, at most 10, got nan"),
        ({"zipf_exponent": 1e308}, "at most 10, got 1e.308"),
    ],
    ids=str,
)
def test_traffic_out_of_range_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Traffic(**change)


def test_sizes_are_read_in_mib(write):
    assert read_sizes(write("s.json", '{"a": 80, "b": 0.5}')) == {"a": 80 * MIB, "b": MIB // 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 80,\n"b"}', "s.json, line 2: found invalid JSON"),
        ("[80]", "s.json: expected an object such as"),
        ("[" * 100_000, "s.json: found lists or mappings that are nested too deeply"),
        (f'{{"a": {"9" * 400}}}', "s.json: found a whole number of more than 64 bits"),
        ('{"a": 1e300}', "s.json: the size of 'a' must be a positive number of MiB"),
        ('{"a": "80"}', "s.json: adapter 'a' must have a positive MiB, got '80'"),
        ('{"a": 0}', "s.json: adapter 'a' must have a positive MiB, got 0"),
        ('{"a": Infinity}', "s.json: the size of 'a' must be a positive number of MiB, got inf"),
    ],
)
def test_wrong_sizes_are_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        read_sizes(write("s.json", text))


def test_a_rank_mix_gives_sizes_in_proportion():
    names = [str(i) for i in range(1_000)]
    sizes = sizes_by_rank(names, parse_rank_mix("8=3,64=1"), mib_per_rank=0.5, seed=0)
    counts = Counter(sizes.values())
    assert set(counts) == {4 * MIB, 32 * MIB}
    assert counts[4 * MIB] == pytest.approx(750, abs=50)


@pytest.mark.parametrize("text", ["", "8", "8=", "a=1", "8=1,", "0=1", "8=0", "8=-1", "8=nan"])
def test_a_wrong_rank_mix_is_refused(text):
    with pytest.raises(ConfigError, match="a rank mix must"):
        parse_rank_mix(text)
