"""Compiled as vLLM compiles models on GPUs, or on CPUs, an engine answers as PEFT does.

Inductor is left out, since a C++ compiler would take minutes for what it makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ..engine import running_engine
from ..models.scenarios import Scenario
from .test_parity import answers_by_adapter, assert_all_as_peft

pytestmark = pytest.mark.serving


@contextmanager
def compiled_as_on_gpus() -> Iterator[None]:
    """Engines that are made within it compile the pieces of their models between attention layers.

    The layers have vLLM's own forwards, as on GPUs.
    """
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    from vllm_multilora.integration.worker.slots import model_manager

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(platform: Any, vllm_config: Any) -> None:
        check(platform, vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "eager"
        compilation.compile_sizes = []

    with pytest.MonkeyPatch.context() as patch:
        changed = classmethod(check_and_update_config)
        patch.setattr(CpuPlatform, "check_and_update_config", changed)
        patch.setattr(model_manager, "with_short_forward", lambda layer: layer)
        yield


def test_a_compiled_model_answers_as_peft(llama: Scenario) -> None:
    from vllm.compilation.counter import compilation_counter

    pieces = compilation_counter.num_piecewise_capturable_graphs_seen
    with (
        compiled_as_on_gpus(),
        running_engine(llama.base, in_process=True, enforce_eager=False) as llm,
    ):
        assert compilation_counter.num_piecewise_capturable_graphs_seen > pieces
        assert_all_as_peft(answers_by_adapter(llm, llama, llama.cases))


def test_a_model_that_is_compiled_on_request_answers_as_peft(
    llama: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # Dynamo, no Inductor, and no warm-up
    traced = counters["stats"]["calls_captured"]
    with running_engine(
        llama.base, in_process=True, enforce_eager=False, compilation_config={"mode": 3}
    ) as llm:
        assert_all_as_peft(answers_by_adapter(llm, llama, llama.cases))
    assert counters["stats"]["calls_captured"] > traced


@pytest.mark.parametrize(
    ("asked", "mode", "operators"),
    [
        ({}, 0, "all"),
        ({"compilation_config": {"mode": 0}}, 0, "all"),
        ({"compilation_config": {"mode": 2}}, 2, "none"),
        ({"compilation_config": {"mode": 3}}, 2, "none"),
        ({"compilation_config": {"custom_ops": ["none"]}}, 0, "none"),
        ({"compilation_config": {"mode": 3}, "enforce_eager": True}, 0, "all"),
    ],
)
def test_only_compiled_models_lack_operators_of_vllm(
    llama: Scenario, asked: dict[str, Any], mode: int, operators: str
) -> None:
    found = _compilation(llama, **asked)
    assert (found.mode, operators in found.custom_ops) == (mode, True)


def test_a_model_is_not_compiled_without_a_compiler(
    llama: Scenario, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": "/nonexistent/g++"}):
        assert _compilation(llama, compilation_config={"mode": 3}).mode == 0
    assert "The model is not compiled: No working C++ compiler found" in caplog.text


def _compilation(llama: Scenario, **arguments: Any) -> Any:
    """What vLLM and the plugin make of settings, for a server with adapters."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_multilora.integration.patching.tables.ledger import apply_patches

    apply_patches()
    made = EngineArgs(str(llama.base), enable_lora=True, max_model_len=64, **arguments)
    return made.create_engine_config().compilation_config


def test_no_request_waits_until_log_probabilities_are_compiled(llama: Scenario) -> None:
    from torch._dynamo.utils import counters
    from vllm import SamplingParams

    torch.compiler.reset()  # what another engine of this process has compiled
    with running_engine(llama.base, in_process=True, enforce_eager=False) as llm:
        compiled = counters["stats"]["unique_graphs"]
        prompts = [{"prompt_token_ids": [7, 21, 88]}] * 3
        (answer, *_) = llm.generate(prompts, SamplingParams(max_tokens=2, logprobs=2))
        assert answer.outputs[0].logprobs
        assert counters["stats"]["unique_graphs"] == compiled
