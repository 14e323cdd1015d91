"""`vllm-multilora simulate` end to end, in this process."""

import json
import sys
from pathlib import Path

import pytest

from vllm_multilora import cli
from vllm_multilora.toolbox.commands.output import plots

EXAMPLES = Path(__file__).parents[2] / "examples" / "cache_policy"
SMALL = ["--synthetic", "zipf", "--requests", "500", "--adapters", "30", "--max-loras", "4"]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    status = cli.main(["simulate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def report(capsys, *arguments):
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.fixture
def trace(tmp_path):
    """Six requests for three adapters: `a` of 2 MiB, `b` of 1 MiB, `c` unstated."""
    path = tmp_path / "trace.csv"
    path.write_text(
        "time,adapter,bytes\n1,a,2097152\n2,b,1048576\n3,a,2097152\n4,c,\n5,b,1048576\n6,a,2097152\n"
    )
    return path


def test_a_trace_is_counted_by_hand(trace, capsys):
    """LRU, one slot, two places in host memory, one request at a time."""
    found = report(
        capsys, trace, "--max-loras", 1, "--max-cpu-loras", 2, "--concurrency", 1,
        "--adapter-mib", 4, "--policy", "lru",
    )  # fmt: skip
    assert found["trace"] == {"requests": 6, "adapters": 3, "bytes": 7 * 2**20}
    assert found["server"] == {
        "max_loras": 1,
        "max_cpu_loras": 2,
        "cpu_cache_bytes": None,
        "concurrency": 1,
    }
    # Host memory after each request: a, ab, ab (hit), ac, cb, ba.
    assert found["policies"] == [
        {
            "policy": "lru",
            "requests": 6,
            "gpu_hits": 0,
            "cpu_hits": 1,
            "loads": 5,
            "activations": 6,
            "gpu_evictions": 5,
            "cpu_evictions": 3,
            "bytes_loaded": (2 + 1 + 4 + 1 + 2) * 2**20,
            "bytes_activated": (2 + 1 + 2 + 4 + 1 + 2) * 2**20,
            "gpu_hit_rate": 0,
            "cpu_hit_rate": 1 / 6,
        }
    ]
    # Slot and host memory have places for all three.
    assert found["optimum"] == {
        "gpu_hit_rate": 0,
        "cpu_hit_rate": 3 / 6,
        "loads": 3,
        "activations": 6,
        "compulsory": 3,
    }


def test_the_table_has_a_row_for_every_policy_and_the_optimum(capsys):
    status, out, _ = run(capsys, *SMALL)
    assert status == 0
    rows = [line.split() for line in out.splitlines()]
    header = rows.index(next(row for row in rows if row[:1] == ["policy"]))
    assert [row[0] for row in rows[header + 1 : header + 6]] == [
        "lru",
        "lfu",
        "slru",
        "gdsf",
        "optimum",
    ]
    assert "500 requests, 30 adapters" in out
    assert "4 slots, host memory: 8.00 GiB, batches of 8 requests" in out


def test_the_table_and_the_json_agree(capsys):
    _, out, _ = run(capsys, *SMALL, "--policy", "lfu")
    (row,) = (line.split() for line in out.splitlines() if line.startswith("lfu"))
    (found,) = report(capsys, *SMALL, "--policy", "lfu")["policies"]
    assert row[1] == f"{found['gpu_hit_rate']:.1%}"
    assert row[3] == str(found["loads"])


def test_a_policy_of_ones_own_is_compared_with_the_others(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    found = report(
        capsys, "--synthetic", "scan", "--requests", 3_000, "--max-loras", 8,
        "--policy", "lru", "--policy", "lru2_policy:Lru2Policy",
    )  # fmt: skip
    lru, lru2 = found["policies"]
    assert lru2["policy"] == "lru2_policy:Lru2Policy"
    assert lru2["loads"] < lru["loads"]


def test_larger_batches_are_cut_to_the_slots_and_need_no_host_memory_while_they_run(capsys):
    arguments = [*SMALL, "--adapter-mib", 1000, "--cpu-cache-gib", 1, "--concurrency", 50]
    for policy in report(capsys, *arguments)["policies"]:
        assert policy["gpu_hits"] > 0


def test_sizes_come_from_a_file_or_a_mix_of_ranks(trace, tmp_path, capsys):
    sizes = tmp_path / "sizes.json"
    sizes.write_text('{"c": 8, "a": 100}')
    found = report(capsys, trace, "--adapter-sizes", sizes)
    assert found["trace"]["bytes"] == (2 + 1 + 8) * 2**20  # the trace's own sizes come first
    found = report(capsys, trace, "--rank-mix", "8=1", "--mib-per-rank", 2)
    assert found["trace"]["bytes"] == (2 + 1 + 16) * 2**20


def test_an_adapter_without_a_size_in_the_file_is_named(trace, tmp_path, capsys):
    sizes = tmp_path / "sizes.json"
    sizes.write_text('{"a": 1}')
    status, _, err = run(capsys, trace, "--adapter-sizes", sizes)
    assert status == 2
    assert "sizes.json: has no size for adapter 'c'" in err


def test_plot_draws_a_line_for_every_policy_over_the_slots(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    drawn = {}
    draw = plots.draw_hit_rates

    def watched(slots, rates, title, path):
        drawn.update(slots=slots, rates=rates)
        draw(slots, rates, title, path)

    monkeypatch.setattr(plots, "draw_hit_rates", watched)
    arguments = [*SMALL, "--max-loras", 6, "--max-cpu-loras", 20, "--policy", "lru"]
    status, _, err = run(capsys, *arguments, "--plot", tmp_path / "rates.png")
    assert (status, err) == (0, f"wrote {tmp_path / 'rates.png'}\n")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert run(capsys, *arguments, "--plot", tmp_path / "rates.SVG")[0] == 0
    assert "<svg" in (tmp_path / "rates.SVG").read_text()
    assert drawn["slots"] == [1, 2, 4, 6, 8, 16]
    assert list(drawn["rates"]) == ["lru", "optimum"]
    (at_six,) = report(capsys, *arguments)["policies"]
    assert drawn["rates"]["lru"][3] == at_six["gpu_hit_rate"]
    assert drawn["rates"]["lru"] == sorted(drawn["rates"]["lru"])

    status, _, err = run(capsys, *arguments, "--plot", tmp_path / "rates.xyz")
    assert status == 2
    assert "its name ends in '.xyz', expected one of .png, .svg" in err


def test_without_matplotlib_plot_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capsys, *SMALL, "--plot", tmp_path / "rates.png")
    assert status == 2
    assert out == ""
    assert "--plot needs matplotlib: pip install 'vllm-multilora[plot]'" in err
