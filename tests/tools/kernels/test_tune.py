"""The tuner: its candidates and batches, the table that it writes, and its command."""

import itertools
from dataclasses import asdict

import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from multilora_kernels.configs import (
    choice,
    choose_expand,
    choose_shrink,
    default_shrink,
    load_table,
)
from multilora_kernels.configs.config_table import (
    Origin,
)
from multilora_kernels.triton.launch import DeviceFacts
from tools.kernels import tune
from tools.kernels.measure.batches import LAYERS, Layer, build
from tools.kernels.measure.environment import Environment
from tools.kernels.measure.tuned import trials
from tools.kernels.measure.tuned.candidates import (
    LIMIT,
)
from tools.kernels.measure.tuned.selection import Effort, Margins, UnusableConfigError
from tools.kernels.measure.tuned.trials import (
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


def test_held_out_batches_share_no_kind_of_batch_with_training():
    for bucket, max_rank in itertools.product(buckets([16, 1024, 64]), (8, 16, 64)):
        shape = LAYERS["8b.o"], bucket, 32, max_rank
        training, held_out = training_specs(*shape), held_out_specs(*shape)
        kinds = [{(s.popularity, s.ranks) for s in specs} for specs in (training, held_out)]
        assert not kinds[0] & kinds[1]
        for spec in (*training, *held_out):
            assert spec.tokens in bucket
        assert {spec.tokens for spec in held_out} >= {bucket[0], bucket[-1]}


SMALL = Layer("small", 32, (16, 16))


def layer_on_batch() -> LayerOnBatch:
    spec = held_out_specs(SMALL, range(3, 5), 2, 32)[3]
    return LayerOnBatch(build(spec, DEVICE, torch.float32, seed=1), FACTS)


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
