"""What a start does with the outcome of a trial; for trials, see tests/kernels/test_trial.py."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from multilora_kernels.trial.cases import Ended
from multilora_kernels.trial.requests import TrialRequest
from multilora_kernels.trial.supervisor import TrialError
from vllm_multilora.errors import ConfigError

from .test_warm_up import RANK, SLOTS, make_layer, stacked

pytestmark = [
    pytest.mark.serving,  # imports vLLM
    pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch stands for vLLM's kernels"),
]

DTYPE = torch.bfloat16


class Trials:
    """Stands for trials: each has all cases right, but for those that are named."""

    def __init__(self) -> None:
        self.asked: list[TrialRequest] = []
        self.problems: dict[tuple[int, str], str] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.error: TrialError | None = None

    def __call__(self, request: TrialRequest) -> list[Ended]:
        self.asked.append(request)
        if self.error is not None:
            raise self.error
        return [
            Ended(
                kind,
                name,
                rows,
                self.problems.get((kind, name), ""),
                self.seconds.get((name, rows)),
            )
            for kind in range(len(request.kinds))
            for name in request.backends
            for rows in request.rows
            if rows == request.rows[0] or (kind, name) not in self.problems
        ]


@pytest.fixture
def trials(monkeypatch, tmp_path) -> Trials:
    from vllm_multilora.integration.worker.kernel_choice import guarded_start

    found = Trials()
    monkeypatch.setattr(guarded_start, "run_trial", found)
    monkeypatch.setenv("MULTILORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return found


def make_layers(backend: str = "triton", *, factors: Any = None) -> dict[str, Any]:
    """Two layers of one kind, and one of another."""
    from vllm_multilora.integration.step.punica import MultiLoRAPunicaWrapper

    lora_config = SimpleNamespace(max_loras=SLOTS)
    wrapper = MultiLoRAPunicaWrapper(64, 8, "cpu", backend=backend, lora_config=lora_config)
    layers = {}
    for name, inputs, width in (("0.o", 96, 96), ("1.o", 96, 96), ("0.down", 208, 96)):
        a, b = (stacked(1, RANK, inputs),), (stacked(1, width, RANK),)
        layer = layers[name] = make_layer("RowParallelLinearWithLoRA", a, b)
        ranks = torch.zeros(1, SLOTS, dtype=torch.int32)
        layer.set_mapping(wrapper.for_layer(ranks, ranks, factors))
    return layers


def choose(layers: dict[str, Any], kernels: str = "auto", backend: str = "triton", **more) -> Any:
    from vllm_multilora.integration.worker.kernel_choice.guarded_start import (
        StartSettings,
        choose_kernels,
    )
    from vllm_multilora.integration.worker.kernel_choice.reporting import kernel_rows

    return kernel_rows(choose_kernels(layers, backend, StartSettings(kernels, DTYPE, **more)))


def in_short(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
    return [tuple(row[key] for key in ("layers", "rows", "kernels", "reason")) for row in rows]


def test_each_kind_of_layer_is_tried_once_with_all_that_decides_its_kernels(trials):
    assert in_short(choose(make_layers())) == [
        ("o", "all", "ours", "checked"),
        ("down", "all", "ours", "checked"),
    ]
    [asked] = trials.asked
    assert [(kind.inputs, kind.widths, kind.slots) for kind in asked.kinds] == [
        (96, (96,), SLOTS),
        (208, (96,), SLOTS),
    ]
    assert set(asked.backends) == {"ours", "torch"}
    assert (asked.max_tokens, asked.timing_s) == (64, 0)


def test_a_second_start_takes_what_the_first_has_found(trials):
    trials.problems[1, "ours"] = "row 3 of 8 is off"
    first = choose(make_layers())
    assert choose(make_layers()) == first
    assert len(trials.asked) == 1
    choose(make_layers("triton-invariant"), backend="triton", kernels="ours")
    assert len(trials.asked) == 1


def test_a_kind_that_is_wrong_is_served_by_others_and_the_log_says_why(trials, caplog):
    trials.problems[1, "ours"] = "row 3 of 8 is off"
    rows = choose(make_layers())
    assert in_short(rows)[1] == ("down", "all", "torch", "wrong")
    assert rows[1]["problem"] == "row 3 of 8 is off (with 1 rows)"
    [said] = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert "torch for linear 208 -> 96 (down): ours are wrong here: row 3 of 8 is off" in said


def test_the_layers_of_a_wrong_kind_compute_with_the_others_kernels(trials, monkeypatch):
    from multilora_kernels import torch_backend

    trials.problems[1, "ours"] = "row 3 of 8 is off"
    layers = make_layers()
    choose(layers)
    seen: list[int] = []
    monkeypatch.setattr(torch_backend, "lora_linear", lambda y, x, *rest: seen.append(x.size(1)))
    for layer in layers.values():
        wrapper, a = layer.punica_wrapper, layer.lora_a_stacked
        wrapper.plan.update(np.zeros(2, np.int64))
        y, x = torch.zeros(2, 96, dtype=DTYPE), torch.zeros(2, a[0].size(-1), dtype=DTYPE)
        wrapper.add_lora_linear(y, x, a, layer.lora_b_stacked, 1.0, (96,))
    assert seen == [208]


def test_ranges_of_rows_may_have_different_kernels(trials):
    trials.seconds = {
        ("ours", 1): 1e-6,
        ("torch", 1): 2e-6,
        ("ours", 17): 9e-6,
        ("torch", 17): 4e-6,
    }
    assert in_short(choose(make_layers()))[:2] == [
        ("o", "1 to 1", "ours", "slower"),
        ("o", "above 1", "torch", "slower"),
    ]


def test_where_nothing_could_be_tried_ours_do_not_serve_and_the_next_start_tries(trials, caplog):
    trials.error = TrialError("out of memory")
    assert in_short(choose(make_layers())) == [
        ("o", "all", "torch", "unchecked"),
        ("down", "all", "torch", "unchecked"),
    ]
    assert "could not be tried on Triton's interpreter: out of memory" in caplog.text
    trials.error = None
    assert {row["reason"] for row in choose(make_layers())} == {"checked"}


def test_a_setting_decides_without_a_trial(trials):
    assert choose(make_layers(), "ours") == []
    assert {(row["kernels"], row["reason"]) for row in choose(make_layers(), "vllm")} == {
        ("torch", "asked")
    }
    assert not trials.asked


def test_no_right_kernels_are_an_error_of_the_settings(trials):
    trials.problems = {(0, "ours"): "row 0 is off", (0, "torch"): "RuntimeError: no"}
    with pytest.raises(ConfigError, match=r"no kernels .* 96 -> 96 .*--multilora-kernels ours"):
        choose(make_layers())


def test_what_others_cannot_do_is_refused_where_ours_are_wrong(trials):
    trials.problems[0, "ours"] = "row 0 is off"
    with pytest.raises(ConfigError, match=r"^--multilora-batch-invariant cannot be had .*row 0"):
        choose(make_layers("triton-invariant"), backend="triton-invariant")
    rows = choose(make_layers(), backend="triton-invariant", vllm_is_invariant=True)
    assert rows[0]["kernels"] == "torch"


def test_the_rest_of_a_slot_is_cleared_and_nothing_else():
    from vllm_multilora.integration.worker.slots.slot_buffers import SlotRests

    a, b = torch.ones(3, 1, 4, 5), torch.ones(3, 1, 4, 6).mT
    kept = torch.ones(3, 1, 4, 5), torch.ones(3, 1, 6, 4)
    rests = SlotRests({1: (a, b)})
    rests.clear(2, np.array([4, 1, 0], np.int32), np.array([4, 3, 0], np.int32))
    assert a[2, 0].sum(1).tolist() == [5, 0, 0, 0]
    assert b[2, 0].sum(0).tolist() == [6, 6, 6, 0]
    assert a[:2].equal(kept[0][:2])
    assert b[:2].equal(kept[1][:2])
    rests.clear(0, np.zeros(3, np.int32), np.full(3, 4, np.int32))
    assert a[0].sum() == 0
    assert b[0].equal(kept[1][0])
