"""Benchmarks: each says what it measures, one runs, and the page is made of what they recorded."""

import ast
import os
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import registry, report, results
from benchmarks.harness.results import RESULTS


def test_what_runs_a_benchmark_needs_nothing_of_the_revision_that_is_measured():
    """With `--base` that is an older one, which may not have what today's package has."""
    files = [Path(main.__code__.co_filename), *Path(registry.__file__).parent.glob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    found |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    assert not {name for name in found if name.startswith(("vllm_multilora", "multilora_kernels"))}


def test_each_says_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in registry.names():
        found = registry.named(name)
        assert found.about.endswith("."), name
        assert all((found.workload, found.control, found.figure, found.compares_to)), name
        assert found.parse(f"{option}={value}" for option, value in found.quick.items()) == (
            found.quick
        ), name
        assert f"{name}: {found.about}" in listed


def test_quick_runs_wait_for_no_kernels_of_stock_vllm() -> None:
    """These take a hundred times as long: on a slow machine no request would end in time."""
    for name in {*registry.names()} - {"server_start"}:  # which computes nothing
        found = registry.named(name)
        options = {**found.options, **found.quick}
        assert not options.get("stock_rounds") or options.get("engines") == "plugin", name
        assert not any("stock" in str(value).split(",") for value in options.values()), name


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:  # noqa: PTH123 (a descriptor)
        monkeypatch.setattr("sys.stdout", closed)
        assert main(["list"]) == 0


def test_one_runs_and_is_recorded(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "records.jsonl"
    command = ["run", "slots_step", "--quick", "--json", str(file)]
    assert main([*command, "repeats=2"]) == 0
    assert "| lru |" in capsys.readouterr().out
    [record] = results.read(file)
    assert (record.benchmark, record.options) == ("slots_step", {"repeats": 2})
    assert main(command) == 0
    _, record = results.read(file)
    assert record.options == registry.named("slots_step").quick, "not as of a run with the defaults"
    assert record.machine["cores"]
    assert record.versions["python"]
    assert all(figure.values for figure in record.figures)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "there is no benchmark 'nonsense'"),
        (["slots_step", "rounds=3"], "slots_step has no option 'rounds'"),
        (["slots_step", "repeats=many"], "repeats must be int, got 'many'"),
        (["cpu_throughput", "keep_memory=yes"], "keep_memory must be bool, got 'yes'"),
        (["repeats=3"], "name a benchmark"),
    ],
)
def test_what_there_is_not_is_refused(words, said, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_page_is_made_of_the_results() -> None:
    assert report.filled(report.PAGE.read_text()) == report.PAGE.read_text(), (
        "run python -m benchmarks report"
    )


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.stem)
def test_results_are_of_a_benchmark_and_on_the_page(file) -> None:
    for record in results.read(file):
        assert record.benchmark == file.stem
        assert set(record.options) <= set(registry.named(file.stem).options)
        assert not record.commit.endswith("+"), "measured with files that nobody else has"
    assert f"<!-- figures: {file.stem} -->" in report.PAGE.read_text()
