"""Kernels are tried before they serve: what is wrong, raises, hangs, faults or is slower, shows."""

import time
from dataclasses import replace

import pytest
import torch

from multilora_kernels.trial import cases, choices, records, supervisor
from multilora_kernels.trial import trial_backends as backends
from multilora_kernels.trial.cases import (
    MAX_TIMING_SECONDS,
    Backend,
    Begun,
    Ended,
    LimitedClock,
)
from multilora_kernels.trial.kinds import LayerKind
from multilora_kernels.trial.requests import NamedBackend, TrialRequest
from multilora_kernels.trial.result_checks import problem_with
from multilora_kernels.trial.supervisor import TrialError, TrialLimits
from multilora_kernels.trial.trial_problems import TrialProblem

from . import trial_backends

CPU = torch.device("cpu")
F32 = "float32", "float32", "float32"
LINEAR = LayerKind("linear", 7, 40, (24, 8), 2, 16, 16, *F32, True, 32)
BAD = replace(LINEAR, inputs=trial_backends.BAD_INPUTS)
HALF = ("bfloat16",) * 3
KINDS = {
    "linear": LINEAR,
    "linear by rows": replace(LINEAR, by_column=False),
    "linear in bfloat16": LayerKind("linear", 4, 64, (48,), 1, 8, 8, *HALF, True, 48),
    "linear written apart": replace(LINEAR, add_inputs=False),
    "linear with padding": replace(LINEAR, columns=64),
    "router": LayerKind(
        "linear", 4, 64, (8,), 1, 8, 8, "bfloat16", "bfloat16", "float32", True, 8
    ),
    "shrink": LayerKind("shrink", 5, 48, (), 2, 8, 0, *HALF[:2], "float32"),
    "expand": LayerKind(
        "expand", 5, 16, (24,), 1, 0, 16, "bfloat16", "float32", "bfloat16", True, 40, 16
    ),
}  # fmt: skip
ROWS = (1, 5, 33)


def named(function: str, **options) -> NamedBackend:
    return NamedBackend(f"{trial_backends.__name__}:{function}", **options)


def request_for(kinds: tuple[LayerKind, ...], **by_name: NamedBackend) -> TrialRequest:
    return TrialRequest(kinds, ROWS, by_name, "cpu", 64, timing_s=0.0)


def run(kinds, clock=None, rows=ROWS, **by_name) -> list:
    seen: list = []
    found = {
        name: Backend(each) if callable(each) else each.load() for name, each in by_name.items()
    }
    cases.run_cases(kinds, rows, found, seen.append, device=CPU, max_tokens=64, clock=clock)
    return seen


def ended(events: list) -> list[Ended]:
    return [event for event in events if isinstance(event, Ended)]


class TestChecks:
    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
    def test_right_kernels_have_no_problem(self, kind):
        found = ended(run([kind], ours=backends.torch_products))
        assert [each.rows for each in found] == list(ROWS)
        assert not [each.problem for each in found if each.problem]

    @pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
    def test_the_triton_kernels_are_right_in_the_interpreter(self, kind):
        found = ended(run([kind], rows=(1, 17), ours=backends.triton))
        assert [(each.rows, each.problem) for each in found] == [(1, ""), (17, "")]

    def test_one_wrong_row_of_many_is_found_and_named(self):
        found = ended(run([LINEAR, BAD], ours=trial_backends.wrong))
        assert [(each.kind, each.rows) for each in found if not each.problem] == [
            *((0, rows) for rows in ROWS),
            (1, 1),
        ]
        assert found[-1].problem.startswith("row 4 of 5 is off by ")

    def test_a_row_that_is_left_out_is_found(self):
        expected = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
        right = expected.to(torch.bfloat16)
        assert problem_with(right, expected, 1e-2) == ""
        right[70] = 0
        assert problem_with(right, expected, 1e-2).startswith("row 70 of 100 is off by")
        right[70] = float("nan")
        assert problem_with(right, expected, 1e-2) == "row 70 has values that are not finite"

    def test_an_error_is_a_problem_in_one_line(self):
        found = ended(run([BAD], ours=trial_backends.raising))
        assert [each.problem for each in found] == [
            "RuntimeError: out of resource: shared memory Required: 262144"
        ]

    def test_reading_past_the_true_ranks_shows_unless_that_is_allowed(self):
        kept, allowed = named("reading_rests"), named("reading_rests", reads_rests=True)
        assert "not finite" in ended(run([LINEAR], ours=kept))[-1].problem
        assert not any(each.problem for each in ended(run([LINEAR], ours=allowed)))

    def test_batches_have_mixed_ranks_rows_without_adapter_and_idle_slots(self):
        problem = TrialProblem(LINEAR, CPU, 64)
        batch = problem.mixed_batch(33)
        assert {-1, 0} < set(batch.slots.tolist())
        assert not set(batch.slots.tolist()) & {2, 5}
        assert {0, 16} < set(problem.weights.ranks.flatten().tolist())

    def test_each_case_is_announced_before_it_begins(self):
        events = run([LINEAR], ours=backends.torch_products)
        pairs = zip(events[::2], events[1::2], strict=True)
        for (begin, end), rows in zip(pairs, ROWS, strict=True):
            assert begin == Begun(0, "ours", rows)
            assert (end.kind, end.backend, end.rows) == (0, "ours", rows)


class Clock:
    """Says how long calls take by whose they are; the faster kernels are others with more rows."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds = {name: iter(values) for name, values in seconds.items()}

    def run(self, kinds, rows) -> list[Ended]:
        found = []
        for name in self.seconds:
            by_name = {name: backends.torch_products}
            clock = lambda call, name=name: call() or next(self.seconds[name])  # noqa: E731
            found += ended(run(kinds, LimitedClock(clock), rows, **by_name))
        return found


class SlowTimer:
    """Stands still but for timing: each call that is timed takes so many seconds of it."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.time_s = seconds, 0.0

    def now(self) -> float:
        return self.time_s

    def clock(self, call) -> float:
        call()
        self.time_s += self.seconds
        return 1e-6

    def run(self, limit: float, **by_name) -> list[Ended]:
        clock = LimitedClock(self.clock, limit, self.now)
        return ended(run([LINEAR, replace(LINEAR, inputs=56)], clock, **by_name))


class TestTimeLimit:
    right = dict.fromkeys(("ours", "stock"), backends.torch_products)

    def test_timing_slow_kernels_ends_at_its_limit_and_checks_go_on(self):
        timer = SlowTimer(4.0)
        found = timer.run(MAX_TIMING_SECONDS, **self.right)
        assert len(found) == 2 * 2 * len(ROWS)
        assert not [each.problem for each in found if each.problem]
        timed = [each for each in found if each.seconds is not None]
        assert 0 < len(timed) < len(found)
        assert timed == found[: len(timed)]
        longest = max(each.timing_s for each in timed)
        assert MAX_TIMING_SECONDS <= timer.time_s < MAX_TIMING_SECONDS + longest
        assert timer.time_s == sum(each.timing_s for each in found)

    def test_ours_serve_rows_that_could_not_be_timed(self):
        found = SlowTimer(30.0).run(MAX_TIMING_SECONDS, **self.right)
        assert sum(each.seconds is not None for each in found) == 1
        assert choices.choose(0, "o", found, "ours", "stock").ranges == ((None, "ours"),)

    def test_wrong_kernels_are_found_after_the_limit(self):
        found = SlowTimer(30.0).run(
            MAX_TIMING_SECONDS, ours=backends.torch_products, stock=trial_backends.raising_always
        )
        assert all(each.problem for each in found if each.backend == "stock")

    def test_a_second_process_has_the_time_that_is_left(self):
        asked = replace(request_for((LINEAR,), ours=named("right")), timing_s=20.0)
        assert asked.without(frozenset(), 12.0).timing_s == 8.0
        assert asked.without(frozenset(), 25.0).timing_s == 0.0


class TestChoices:
    def test_the_faster_kernels_serve_each_range_of_rows(self):
        clock = Clock(ours=[3e-6, 2e-6, 2e-6, 5e-6, 5e-6], stock=[4e-6, 2e-6, 3e-6, 4e-6, 4e-6])
        found = choices.choose(0, "o", clock.run([LINEAR], ROWS), "ours", "stock")
        assert found.ranges == ((5, "ours"), (None, "stock"))
        assert found.microseconds["ours"] == pytest.approx({1: 3, 5: 4, 33: 10})
        assert [found.backend(rows) for rows in (1, 5, 6, 4096)] == [
            *("ours", "ours"),
            *("stock", "stock"),
        ]
        assert found.describe() == "ours up to 5 rows, stock above"

    def test_a_difference_within_the_margin_changes_nothing(self):
        clock = Clock(ours=[1e-6] * 5, stock=[0.99e-6] * 5)
        found = choices.choose(0, "o", clock.run([LINEAR], ROWS), "ours", "stock")
        assert found.ranges == ((None, "ours"),)

    @pytest.mark.parametrize("failing", ["wrong", "raising"])
    def test_kernels_that_fail_serve_no_rows_of_that_kind(self, failing):
        events = run([LINEAR, BAD], ours=named(failing), stock=named("right"))
        by_kind = [choices.choose(k, "o", ended(events), "ours", "stock") for k in (0, 1)]
        assert [each.ranges for each in by_kind] == [((None, "ours"),), ((None, "stock"),)]
        assert by_kind[1].problems["ours"].endswith(" rows)")

    def test_faster_kernels_that_are_wrong_are_not_taken(self):
        results = [Ended(0, "ours", 1, seconds=9e-6), Ended(0, "stock", 1, "row 0 is off")]
        found = choices.choose(0, "o", results, "ours", "stock")
        assert found.ranges == ((None, "ours"),)
        assert found.problems == {"stock": "row 0 is off (with 1 rows)"}

    def test_no_right_kernels_are_an_error_that_says_what_is_wrong_with_each(self):
        events = run([BAD], ours=named("wrong"), stock=named("raising"))
        with pytest.raises(
            choices.NoRightKernelError, match=r"kind qkv .*ours: row.*stock: Runtime"
        ):
            choices.choose(0, "qkv", ended(events), "ours", "stock")


@pytest.mark.waits
class TestSupervisor:
    def test_all_cases_of_right_kernels_come_back(self):
        asked = request_for((LINEAR, BAD), ours=named("right"), stock=named("right"))
        found = supervisor.run_trial(asked)
        assert {(each.kind, each.backend, each.rows) for each in found} == {
            (kind, name, rows) for kind in (0, 1) for name in ("ours", "stock") for rows in ROWS
        }
        assert not any(each.problem for each in found)

    def test_kernels_that_hang_end_within_the_limit_and_others_go_on(self):
        asked = request_for((BAD, LINEAR), ours=named("hanging"), stock=named("right"))
        begin = time.monotonic()
        found = supervisor.run_trial(asked, TrialLimits(case=4.0))
        assert time.monotonic() - begin < 90
        problems = [(e.kind, e.backend, e.rows, e.problem) for e in found if e.problem]
        assert problems == [(0, "ours", 1, "no result within 4 s")]
        assert {(e.kind, e.backend) for e in found if not e.problem} == {
            *((0, "stock"), (1, "ours"), (1, "stock"))
        }

    def test_kernels_that_fault_end_their_own_process_only(self):
        asked = request_for((BAD,), ours=named("faulting"), stock=named("right"))
        found = supervisor.run_trial(asked)
        assert [e.problem for e in found if e.backend == "ours"] == ["its process ended (signal 6)"]
        assert [e.problem for e in found if e.backend == "stock"] == [""] * len(ROWS)

    def test_a_process_that_cannot_begin_is_an_error_with_its_last_words(self):
        asked = request_for((LINEAR,), ours=named("no_such_function"))
        with pytest.raises(TrialError, match=r"ended before .*status 1.*no_such_function"):
            supervisor.run_trial(asked)

    def test_a_device_without_room_says_nothing_of_the_kernels(self):
        asked = request_for((BAD,), ours=named("out_of_memory"))
        with pytest.raises(TrialError, match="the device has no room for it"):
            supervisor.run_trial(asked)

    def test_a_trial_takes_no_longer_than_its_limit(self):
        asked = request_for((BAD,), ours=named("hanging"))
        with pytest.raises(TrialError, match="more than 12 s"):
            supervisor.run_trial(asked, TrialLimits(trial=12.0))


class TestRecords:
    choice = choices.Choice(((8, "ours"), (None, "stock")), {"x": "wrong"}, {"ours": {8: 1.5}})

    def record(self) -> records.Record:
        entry = records.RecordEntry("linear 40 -> 24+8", ("qkv_proj",), self.choice)
        return records.Record({"card": "H100"}, (entry,))

    def test_a_record_is_read_as_it_was_written(self, tmp_path):
        path = records.path_of(tmp_path, {"card": "H100"}, [LINEAR.as_json()])
        assert records.load(path) is None
        records.save(path, self.record())
        found = records.load(path)
        assert replace(found, written=0.0) == self.record()
        assert records.latest(tmp_path, 1) == [found]

    def test_other_facts_and_kinds_have_other_records(self, tmp_path):
        facts, kinds = {"card": "H100", "driver": "570"}, [LINEAR.as_json()]
        paths = {
            records.path_of(tmp_path, facts, kinds),
            records.path_of(tmp_path, {**facts, "driver": "580"}, kinds),
            records.path_of(tmp_path, facts, [BAD.as_json()]),
        }
        assert len(paths) == 3

    def test_kernels_tuned_by_other_tables_have_other_records(self, tmp_path, monkeypatch):
        """Tables decide which blocks a kernel has, and so which kernels are faster."""
        facts, kinds = {"card": "H100"}, [LINEAR.as_json()]
        paths = {records.path_of(tmp_path, facts, kinds)}
        for number in range(2):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / "sm_90.json").write_text(f'{{"architecture": "sm_9{number}"}}')
            monkeypatch.setenv("MULTILORA_CONFIG_DIR", str(folder))
            paths.add(records.path_of(tmp_path, facts, kinds))
        assert len(paths) == 3

    def test_a_record_that_others_may_write_or_nobody_can_read_is_none(self, tmp_path):
        path = tmp_path / "x.json"
        records.save(path, self.record())
        path.chmod(0o666)
        assert records.load(path) is None
        path.chmod(0o600)
        path.write_text('{"facts": 1}')
        assert records.load(path) is None

    def test_the_table_says_which_kernels_serve_and_why(self):
        assert self.record().lines() == [
            "linear 40 -> 24+8  ours up to 8 rows, stock above (x: wrong)"
        ]

    def test_a_request_is_read_as_it_was_written(self):
        asked = request_for((LINEAR, BAD), ours=named("right"), stock=named("wrong"))
        asked = asked.without(frozenset({(0, "ours", 5)}), 0.0)
        assert TrialRequest.decode(asked.encode()) == asked
