"""A server whose kernels are wrong for one kind of layer starts, answers rightly, and says so.

Without a GPU the Triton kernels run in Triton's interpreter, and PyTorch's products take the place
of vLLM's kernels. A `sitecustomize` module spoils our kernels in the server and in the process in
which it tries them.
"""

import logging
import os
import textwrap
from typing import Any

import pytest
import torch

from vllm_multilora.metrics.definitions import KERNELS

from ..engine import running_engine
from ..models.scenarios import Scenario
from .test_triton_backend import ADAPTERS, assert_as_peft, mixed

pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(torch.cuda.is_available(), reason="spoils kernels in the interpreter"),
]

SPOILED_INPUTS = 176
"""Inputs of the kind of layer that is spoiled: `down_proj` of the tiny model."""

SPOIL = f"""
import multilora_kernels.triton as ours

prepare = ours.prepare_linear

def spoiled(lora_a, *args, **kwargs):
    run = prepare(lora_a, *args, **kwargs)
    if lora_a[0].size(-1) != {SPOILED_INPUTS}:
        return run

    def run_and_spoil(plan, *, x, y):
        run(plan, x=x, y=y)
        y[-1] += 3

    return run_and_spoil

ours.prepare_linear = spoiled
"""


def kernels_of_layers(worker: Any) -> dict[str, str]:
    """Runs in the worker: the kernels of each kind of layer, by its layers' names."""
    record = worker.model_runner.lora_manager.model_manager.kernel_record
    return {",".join(entry.layers): entry.choice.describe() for entry in record.entries}


@pytest.fixture
def spoiled(tmp_path, monkeypatch) -> None:
    """Our kernels are wrong for one kind of layer, here and in processes that start now."""
    import multilora_kernels.triton as ours

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    in_trials = "import sys\nif any('trial' in each for each in sys.orig_argv):\n"
    (tmp_path / "sitecustomize.py").write_text(in_trials + textwrap.indent(SPOIL, "    "))
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setattr(ours, "prepare_linear", ours.prepare_linear)  # put back afterwards
    exec(SPOIL, {})


def test_a_server_with_one_spoiled_kind_of_layer_answers_rightly(
    llama: Scenario, spoiled, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm_multilora"), "handlers", [caplog.handler])
    with running_engine(
        llama.base,
        in_process=True,
        max_loras=2,
        enable_prefix_caching=False,
        disable_log_stats=False,
        additional_config={"multilora": {"backend": "triton"}},
    ) as llm:
        (found,) = llm.collective_rpc(kernels_of_layers)
        assert found["down_proj"] == "torch"
        assert {text for name, text in found.items() if name != "down_proj"} == {"ours"}
        assert_as_peft(llm, llama, [case for case in mixed(llama) if case.adapter in ADAPTERS[:2]])
        shown = {
            (metric.labels["kernels"], metric.labels["reason"])
            for metric in llm.get_metrics()
            if metric.name == KERNELS.name
        }
        assert shown == {("ours", "checked"), ("torch", "wrong")}
    assert "torch for linear 176 -> 96 (down_proj): ours are wrong here: row " in caplog.text
