"""Benchmarks: each says what it measures, one runs, and the page is made of what they recorded."""

import ast
import os
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.__main__ import main
from benchmarks.harness import registry, report, results, revisions
from benchmarks.harness.registry import Figure
from benchmarks.harness.results import RESULTS, Record
from benchmarks.harness.tables import table
from benchmarks.tenants import soak
from tests.serving.models.cases import Case, Continuation, Scenario


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


def test_a_table_has_medians_and_what_all_rounds_were() -> None:
    figures = [
        Figure("a", "time, s", [3, 1, 2]),
        Figure("b", "time, s", [0.5, 1.5, float("inf")]),
        Figure("b", "kept", [0.25, 0.5, 0.375]),
    ]
    assert table(figures).splitlines() == [
        "| | time, s | kept |",
        "|---|---|---|",
        "| a | 2 (1 to 3) |  |",
        "| b | 1.50 (0.50 to inf) | 0.38 (0.25 to 0.50) |",
    ]


def test_rounds_of_several_runs_count_as_those_of_one() -> None:
    runs = [
        Record("x", "2026-01-01", "abc", {}, 1.0, {}, {}, [Figure("", "s", values)])
        for values in ([1.0, 2.0], [3.0])
    ]
    assert results.pooled(runs) == [Figure("", "s", [1.0, 2.0, 3.0])]


def test_two_revisions_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ratio of each pair is this revision's median over the other's."""
    order = []

    def run_in(tree, words) -> Record:
        order.append(tree == results.ROOT)
        value = 2.0 if tree == results.ROOT else 4.0
        return Record("x", "2026-01-01", "abc", {}, 1.0, {}, {}, [Figure("", "s", [value])])

    monkeypatch.setattr(revisions, "run_in", run_in)
    figures, records = revisions.compare("HEAD", ["x"], pairs=2)
    assert figures == [Figure("", "s: here / HEAD", [0.5, 0.5])]
    assert order == [False, True, True, False]
    assert len(records) == 4


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


def test_a_long_run_has_pauses_in_which_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[object] = []
    rests: list[int] = []

    @contextmanager
    def call():
        under_way.append(None)
        yield
        under_way.pop()

    class Server:
        pid = os.getpid()

        def get(self, path):
            return httpx.Response(200)

        def post(self, path, json):
            with call():
                return httpx.Response(200, json={"choices": [{"token_ids": [7]}]})

    class Attackers:
        def attack(self):
            with call():
                return "attack", None

    def rest(run: soak.Run) -> None:
        rests.append(len(under_way))
        if len(rests) == 3:
            run._over.set()

    monkeypatch.setattr(soak, "REST_EVERY_S", 0.0)
    monkeypatch.setattr(soak.Run, "_let_rest", rest)
    case = Case("a", (1,), Continuation((7,), (), (), ()))
    findings = soak.Findings()
    soak.Run(Server(), Scenario(Path(), {}, (case,)), findings).go(30.0, [Attackers(), Attackers()])
    assert rests == [0, 0, 0]
    assert findings.answers["right"]
    assert not findings.wrong
