"""The tuner: its candidates and batches, the table that it writes, and its command."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from multilora_kernels import triton as backend
from multilora_kernels.configs import (
    ExpandConfig,
    ShrinkConfig,
    Workload,
    choice,
    choose_expand,
    choose_shrink,
    default_expand,
    default_shrink,
    load_table,
)
from multilora_kernels.configs.config_table import (
    Origin,
    Table,
    TableEntry,
    narrow_first,
    write_table,
)
from multilora_kernels.triton import expand as second_half
from multilora_kernels.triton.launch import DeviceFacts, Launch
from tools.kernels import tune
from tools.kernels.measure.agreement import Expected
from tools.kernels.measure.batches import LAYERS, Layer, build
from tools.kernels.measure.contenders import Multilora
from tools.kernels.measure.counted.counting import count_work
from tools.kernels.measure.environment import Environment
from tools.kernels.measure.tuned import trials
from tools.kernels.measure.tuned.candidates import (
    CHANGES,
    LIMIT,
    expand_candidates,
    shrink_candidates,
)
from tools.kernels.measure.tuned.selection import Effort, Margins, UnusableConfigError
from tools.kernels.measure.tuned.trials import (
    ComputedDefaults,
    LayerOnBatch,
    buckets,
    held_out_specs,
    training_specs,
    workloads,
)
from tools.kernels.measure.tuned.tuning import Task

EFFORT = Effort(screening=5, finalists=3, final=20, validation=50)
MARGINS = Margins(gain=0.03, errors=3.0, loss=0.05)
SHARED_MEMORY = 227 * 1024
FACTS = DeviceFacts("interpreter", 16, pdl=False)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

interpreted = pytest.mark.skipif(
    not backend.INTERPRETED, reason="here these kernels are compiled, not interpreted"
)

WORKLOADS = [
    (layer, tokens, max_rank)
    for layer in ("8b.qkv", "70b.down")
    for tokens in (1, 64, 4096)
    for max_rank in (8, 64, 256)
]


@pytest.mark.parametrize(("layer", "tokens", "max_rank"), WORKLOADS)
def test_candidates_are_different_valid_and_near_the_default(layer, tokens, max_rank):
    facts = DeviceFacts("sm_90", 132, pdl=True)
    shrink, expand = workloads(LAYERS[layer], tokens, max_rank, 2, facts)
    for candidates, default in (
        (shrink_candidates(shrink, SHARED_MEMORY), default_shrink(shrink)),
        (expand_candidates(expand, SHARED_MEMORY), default_expand(expand)),
    ):
        assert 20 < len(candidates) <= LIMIT == 30
        values = {config.per_processor for config in candidates}
        assert values > {default.per_processor}
        assert len(set(candidates)) == len(candidates)
        assert default not in candidates
        for config in candidates:  # a config checks itself
            changed = asdict(config).items() - asdict(default).items()
            assert 1 <= len(changed) <= CHANGES
            assert config.block_m <= max(16, tokens)
            assert config.block_r <= max(16, max_rank)


def test_candidates_leave_out_what_does_not_fit_shared_memory():
    facts = DeviceFacts("sm_90", 132, pdl=True)
    shrink, _ = workloads(LAYERS["8b.qkv"], 64, 64, 2, facts)
    most = {}
    for size in (99 << 10, 227 << 10):
        candidates = shrink_candidates(shrink, size)
        assert len(candidates) > 10
        steps = [(2 * c.block_k * (c.block_m + c.block_r), c) for c in candidates]
        assert all(step * c.num_stages <= size for step, c in steps)
        held = [step * (c.num_stages - 1 or 1) * c.per_processor for step, c in steps]
        most[size] = max(held)
        assert most[size] <= size
    assert most[227 << 10] > 99 << 10


def test_candidates_try_an_early_start_and_rows_without_tensor_cores_where_there_are_such():
    for architecture, starts in (("sm_80", {False}), ("sm_90", {False, True})):
        facts = DeviceFacts(architecture, 132, pdl=architecture == "sm_90")
        for tokens, rows in ((8, {0, 1, 2, 4}), (128, {0, 1, 2, 4}), (512, {0})):
            shrink, _ = workloads(LAYERS["70b.down"], tokens, 64, 2, facts)
            candidates = shrink_candidates(shrink, SHARED_MEMORY)
            assert {config.early for config in candidates} == starts
            assert {config.vector_rows for config in candidates} == rows


def test_held_out_batches_share_no_kind_of_batch_with_training():
    for bucket, max_rank in itertools.product(buckets([16, 1024, 64]), (8, 16, 64)):
        shape = LAYERS["8b.o"], bucket, 32, max_rank
        training, held_out = training_specs(*shape), held_out_specs(*shape)
        kinds = [{(s.popularity, s.ranks) for s in specs} for specs in (training, held_out)]
        assert not kinds[0] & kinds[1]
        for spec in (*training, *held_out):
            assert spec.tokens in bucket
        assert {spec.tokens for spec in held_out} >= {bucket[0], bucket[-1]}


def test_buckets_cover_every_token_count_once():
    assert list(buckets([64, 16])) == [range(1, 17), range(17, 65)]


SMALL = Layer("small", 32, (16, 16))


def layer_on_batch() -> LayerOnBatch:
    spec = held_out_specs(SMALL, range(3, 5), 2, 32)[3]
    return LayerOnBatch(build(spec, DEVICE, torch.float32, seed=1), FACTS)


def test_a_layer_runs_with_the_configurations_asked_for(monkeypatch):
    """Two parts of K and two blocks of ranks, where the default has one of each."""
    shrink = ShrinkConfig(
        block_m=16, block_r=16, num_warps=4, num_stages=2, per_processor=2, block_k=16, split_k=2
    )
    expand = ExpandConfig(
        block_m=16, block_r=16, num_warps=4, num_stages=2, per_processor=2, block_n=16
    )
    ran, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (ran.append(launch), run(launch)))
    layer_on_batch().call(shrink, expand)  # a call with a wrong result would not be handed out
    first, second = ran[-2:]
    assert (first.constants["SPLIT_K"], first.constants["BLOCK_R"]) == (2, 16)
    assert (second.constants["BLOCK_N"], second.constants["BLOCK_R"]) == (16, 16)


@interpreted
@pytest.mark.parametrize("follows", [False, True])
def test_a_layer_may_be_timed_behind_another_kernel(follows):
    """Or nobody could start early beside it; what is computed stays the same."""
    spec = held_out_specs(SMALL, range(3, 5), 2, 32)[3]
    batch = build(spec, DEVICE, torch.float32, seed=1)
    before = batch.x.clone()
    call = LayerOnBatch(batch, FACTS, follows=follows).call(None, None)
    assert count_work(call, batch).operators == (("mul_",) if follows else ())
    assert torch.equal(batch.x, before)


def test_a_configuration_with_a_wrong_result_is_unusable(monkeypatch):
    launches = LayerOnBatch._launches
    monkeypatch.setattr(LayerOnBatch, "_launches", lambda *chosen: [*launches(*chosen)][:1])
    with pytest.raises(UnusableConfigError, match="relative RMS error 1 with"):
        layer_on_batch().call(None, None)


@pytest.mark.parametrize("problem", ["spills", "too large"])
def test_a_configuration_that_the_card_cannot_run_well_is_unusable(monkeypatch, problem):
    def compile_and_run(launch):
        if problem == "too large":
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 12

    monkeypatch.setattr(trials, "spilled_registers", compile_and_run)
    message = {"spills": "shrink_kernel spills 12 registers", "too large": "Required: 300000"}
    with pytest.raises(UnusableConfigError, match=message[problem]):
        layer_on_batch().call(None, None)


def test_a_sum_of_planes_before_the_second_half_is_looked_at_too(monkeypatch):
    monkeypatch.setattr(second_half, "pays_before_expand", lambda *_: True)
    looked_at, look = [], trials.spilled_registers

    def spilled(launch: Launch) -> int:
        looked_at.append(launch.kernel.__name__)
        return look(launch) or 5 * (launch.kernel.__name__ == "combine_kernel")

    monkeypatch.setattr(trials, "spilled_registers", spilled)
    with pytest.raises(UnusableConfigError, match="combine_kernel spills 5 registers"):
        layer_on_batch().call(None, None)
    assert looked_at == ["shrink_kernel", "combine_kernel"]


class PrefersBlocks:
    """A timer that likes one value of the configurations, and runs nothing."""

    method = "simulated"

    def __init__(self, **liked):
        self._liked = liked

    def paired(self, calls, repetitions):
        def time(call):
            values = {key: value for config in call.args for key, value in asdict(config).items()}
            return 100.0 / np.prod([1.25 for k, v in self._liked.items() if values[k] == v])

        return [[time(call)] * repetitions for call in calls]


@interpreted  # the table is the interpreter's
def test_the_computed_defaults_run_whatever_table_is_in_force(configured, monkeypatch):
    """What the benchmark compares a table with."""
    config = ShrinkConfig(
        block_m=16, block_r=16, num_warps=4, num_stages=2, per_processor=2, block_k=16, split_k=2
    )
    write_table(configured / "interpreter.json", "interpreter", Table((TableEntry((), config),)))
    spec = held_out_specs(SMALL, range(3, 5), 2, 16)[3]
    batch = build(spec, dtype=torch.float32, seed=1)
    ran, run = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (ran.append(launch), run(launch)))
    for contender, parts in ((ComputedDefaults(), 1), (Multilora("triton"), 2)):
        Expected(batch).relative_error(contender.prepare(batch))
        assert ran[-2].constants["SPLIT_K"] == parts


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """The folder that tables are read from."""
    monkeypatch.setenv("MULTILORA_CONFIG_DIR", str(tmp_path))
    for function in (choice.choose_shrink, choice.choose_expand):
        function.cache_clear()
    yield tmp_path
    for function in (choice.choose_shrink, choice.choose_expand):
        function.cache_clear()


ENVIRONMENT = Environment("a card", True, "570.1", "2.13.0", "3.9.0", "2026-11-24", "python -m x")


def test_tuning_writes_a_table_that_the_kernels_then_use(configured, monkeypatch, capsys):
    tasks = [Task(SMALL, bucket, 2, 16, torch.float16) for bucket in buckets([2, 4])]
    monkeypatch.setattr(LayerOnBatch, "_check", lambda *_: None)  # hundreds of interpreted runs
    timer = PrefersBlocks(block_k=16, per_processor=1)
    written = tune.tune_all(
        tasks,
        torch.device("cpu"),
        FACTS,
        SHARED_MEMORY,
        timer,
        configured / "interpreter.json",
        ENVIRONMENT,
        EFFORT,
        MARGINS,
    )
    assert load_table("interpreter") == written
    assert written.origin == Origin(
        "a card", "2026-11-24", "570.1", "2.13.0", "3.9.0", "python -m x"
    )
    assert [dict(entry.limits)["tokens"] for entry in written.shrink] == [2, 4]
    for entry in written.shrink:
        assert entry.config.block_k == 16
        assert entry.gain == pytest.approx(1.25)
    for entry in written.expand:
        assert entry.config.per_processor == 1
        assert entry.gain == pytest.approx(1.25)
    shrink, expand = workloads(SMALL, 3, 16, 2, FACTS)
    assert choose_shrink(shrink) == written.shrink[1].config
    assert choose_expand(expand) == written.expand[1].config
    single, _ = workloads(SMALL, 3, 16, 4, FACTS)
    assert choose_shrink(single) == default_shrink(single)  # measured with 16-bit values only
    assert "small, R 16, T 3 to 4" in capsys.readouterr().out


def test_an_entry_that_kept_the_default_shields_it_from_wider_entries(configured):
    narrow, wide = workload(tokens=16), workload(tokens=64)
    config = ShrinkConfig(
        block_m=32, block_r=16, num_warps=2, num_stages=4, per_processor=2, block_k=64, split_k=5
    )
    entries = [TableEntry((("tokens", 64),), config, 1.2), TableEntry((("tokens", 16),), None)]
    table = Table(shrink=narrow_first(entries))
    write_table(configured / "sm_90.json", "sm_90", table)
    assert load_table("sm_90") == table
    assert choose_shrink(narrow) == default_shrink(narrow)
    assert choose_shrink(wide) == config


def workload(**changes) -> Workload:
    values = {"tokens": 64, "width": 4096, "slices": 3, "max_rank": 64, "item_size": 2}
    return Workload(**(values | changes), architecture="sm_90", processors=132)


def test_no_entry_hides_a_narrower_one():
    random = np.random.default_rng(0)
    keys = ("tokens", "width", "max_rank", "slices", "item_size")
    entries = []
    for _ in range(60):
        present = [key for key in keys if random.random() < 0.7]
        entries.append(TableEntry(tuple((k, int(random.integers(1, 4))) for k in present), None))
    ordered = narrow_first(entries)
    for later in range(len(ordered)):
        for earlier in ordered[:later]:
            own, other = (dict(e.limits) for e in (earlier, ordered[later]))
            contains = all(own.get(k, 9) >= other.get(k, 9) for k in keys)
            assert not contains or own == other


BAD_ADDITIONS = {
    "gain": ({"gain": 0}, r"shrink\[0\].gain must be a positive number, found 0"),
    "origin-key": ({}, "origin must have .* missing: command"),
    "origin-value": ({}, "origin.card must be a string, found 3"),
    "config-word": ({"config": "fast"}, r"shrink\[0\].config must be a JSON object, found str"),
}


@pytest.mark.parametrize("name", BAD_ADDITIONS)
def test_what_the_tuner_adds_to_a_table_is_checked_when_it_is_read(configured, name):
    entry, message = BAD_ADDITIONS[name]
    origin = asdict(Origin("card", "date", "driver", "torch", "triton", "command"))
    if name == "origin-key":
        del origin["command"]
    if name == "origin-value":
        origin["card"] = 3
    content = {
        "architecture": "sm_90",
        "origin": origin,
        "shrink": [{"config": "default"} | entry],
        "expand": [],
    }
    (configured / "sm_90.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"sm_90\.json: {message}"):
        load_table("sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu_tuning_is_refused_in_one_sentence(capsys):
    assert tune.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == tune.NO_GPU
    assert "\n" not in captured.err.strip()


def test_a_dry_run_lists_candidates_and_timings(capsys):
    chosen = ["--layers", "8b.o", "--tokens", "16", "64", "--max-rank", "64"]
    assert tune.main(["--dry-run", *chosen]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.startswith("| 8b.o")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "8b.o, R 64, T 1 to 16",
        "8b.o, R 64, T 17 to 64",
    ]
    total = compiled = 0
    for row in rows:
        shrink, expand, calls = (int(cell) for cell in row.split("|")[2:5])
        total += calls
        assert calls == sum(Effort().timed_calls(half, 4, 4) for half in (shrink, expand))
        assert max(shrink, expand) <= LIMIT
        compiled += shrink + expand
    assert f"{total} timed calls at most" in printed
    assert f"{compiled} candidates to be compiled, at most 30 for each half" in printed
    assert tune.main(["--dry-run", "--list", *chosen]) == 0
    listed = capsys.readouterr().out
    assert listed.count(": shrink block_m=") == sum(int(row.split("|")[2]) for row in rows)


AHEAD = """
import json, os
from pathlib import Path
import torch
from multilora_kernels.configs import default_expand, default_shrink
import tools.kernels
from multilora_kernels.triton.compiling.compile_pool import CompilePool, compile_jobs
from multilora_kernels.triton.compiling.compile_process import driver_of, target_of
from tools.kernels.measure.batches import Layer, build
from tools.kernels.measure.tuned.launch_cases import card_facts, configured_launches
from tools.kernels.measure.tuned.trials import LayerOnBatch, training_specs, workloads
from tools.kernels.measure.tuned.tuning import Task, launch_case

def kept(pattern):
    return sorted(path.name for path in Path(os.environ["TRITON_CACHE_DIR"]).glob(pattern))

if __name__ == "__main__":
    facts, layer = card_facts("90"), Layer("o", 64, (64,))
    task = Task(layer, range(1, 17), 6, 16, torch.float16)
    shrink, expand = workloads(layer, 16, 16, 2, facts)
    blocks = default_shrink(shrink), default_expand(expand)
    target = target_of(facts.architecture)
    with CompilePool(1, ("tools.kernels",)) as pool:
        jobs = compile_jobs(configured_launches(launch_case(task), facts, *blocks), target)
        problems = pool.compile(jobs)
    compiled, before = kept("*/*.cubin"), kept("*")
    spec = training_specs(layer, task.bucket, task.max_loras, task.max_rank)[0]
    for launch in LayerOnBatch(build(spec, "cpu", task.dtype), facts)._launches(*blocks):
        with driver_of(target):
            launch.kernel.warmup(
                grid=launch.grid, **launch.arguments, **launch.constants, **launch.options
            )
    print(json.dumps([problems, compiled, len(kept("*")) - len(before)]))
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_a_launch_asks_for(tmp_path):
    """In processes without Triton's interpreter: a launch of the tuner's compiles nothing more."""
    program = tmp_path / "ahead.py"
    program.write_text(AHEAD)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path]),
    }
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], ["expand_kernel.cubin", "shrink_kernel.cubin"], 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "48"], "must be a power of two"),
        (["--max-rank", "0"], "must be at least 1"),
        (["--layers", "13b.qkv"], "invalid choice"),
    ],
    ids=["tokens", "rank", "layer"],
)
def test_arguments_are_checked(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--dry-run", *arguments])
    assert message in capsys.readouterr().err


def test_where_the_table_cannot_be_written_nothing_is_tuned(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.triton_availability, "require", lambda device_type: None)
    monkeypatch.setattr(tune, "_device", lambda architecture, has_gpu: (FACTS, SHARED_MEMORY))
    there = tmp_path / "interpreter.json"
    there.write_text("{}")
    nowhere = tmp_path / "none" / "interpreter.json"
    for path, found in ((there, f"{there} exists"), (nowhere, f"no folder {nowhere.parent}")):
        assert tune.main(["--out", str(path)]) == 2
        assert found in capsys.readouterr().err
    assert there.read_text() == "{}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_layer_is_tuned_and_its_table_loads(configured):
    from multilora_kernels.triton.launch import device_facts

    architecture = device_facts(torch.device("cuda")).architecture
    path = configured / f"{architecture}.json"
    arguments = ["--layers", "8b.o", "--tokens", "16", "--max-rank", "16", "--max-loras", "8"]
    assert tune.main([*arguments, "--out", str(path)]) == 0
    table = load_table(architecture)
    assert len(table.shrink) == len(table.expand) == 1
    assert table.origin.card == torch.cuda.get_device_name()
    assert tune.main([*arguments, "--out", str(path)]) == 2  # a table is never overwritten
