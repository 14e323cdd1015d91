"""Compiled as vLLM compiles models on GPUs, an engine answers as PEFT does.

On CPUs vLLM turns torch.compile off where LoRA is on; here it does not. The layers have vLLM's own
forwards, as on GPUs. What is compiled are the pieces between attention layers; Inductor is left
out, since a C++ compiler would take minutes for what it makes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ..engine import running_engine
from ..models.scenarios import Scenario
from .test_parity import answers_by_adapter, assert_all_as_peft

pytestmark = pytest.mark.serving


@contextmanager
def compiled_as_on_gpus() -> Iterator[None]:
    """Engines that are made within it compile their models."""
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
        patch.setattr(model_manager, "shorten_forward", lambda layer: None)
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
