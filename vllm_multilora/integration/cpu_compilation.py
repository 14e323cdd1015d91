"""What torch.compile does on CPUs: the model where it is asked for, and nothing without a compiler.

On CPUs vLLM compiles the ranks of log-probabilities when the first request asks for them: everybody
waits for that step, and without a compiler it fails, which ends the engine for all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm.config import CompilationConfig, ModelConfig, VllmConfig

logger = logging.getLogger(__name__)


def compiler_problem() -> str:
    """Why PyTorch cannot compile for CPUs; empty where it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error)
    return ""


def compile_only_with_compiler(model: ModelConfig) -> None:
    """Has this process run uncompiled what it cannot compile for its CPU.

    It is set for all of PyTorch: nothing else could be compiled either. What it can compile is
    compiled at once, unless nothing is to be before it is needed (--enforce-eager).
    """
    if problem := compiler_problem():
        torch.compiler.set_stance("force_eager")
        logger.warning(
            "torch.compile is off in this process: %s. Answers are the same. Install g++ or "
            "clang++ for the speed of compiled code.",
            problem.rstrip("."),
        )
    elif model.runner_type == "generate" and not model.enforce_eager:
        from vllm.v1.sample.sampler import Sampler

        with torch.inference_mode():  # else it would be compiled once more in a step
            token = torch.zeros(1, dtype=torch.int64)
            Sampler.gather_logprobs(torch.zeros(1, model.get_vocab_size()), 1, token)


def choose_compilation(vllm_config: VllmConfig, engine_args: Any) -> None:
    """Compiles a CPU's model if its settings ask for it, and has it run vLLM's operators if not.

    vLLM turns torch.compile off on CPUs where LoRA is on, whatever was asked for. By then it has
    replaced its C++ operators by several of PyTorch's each, which are fast only in compiled code.

    Args:
        vllm_config: As vLLM has made it; its compilation changes.
        engine_args: What it was made of; a mode in its `compilation_config` was asked for.
    """
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    made: CompilationConfig = vllm_config.compilation_config
    asked: CompilationConfig = engine_args.compilation_config
    if not current_platform.is_cpu() or made.mode != CompilationMode.NONE:
        return
    if asked.mode in (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE):
        if problem := compiler_problem():
            logger.warning("The model is not compiled: %s.", problem.rstrip("."))
        elif not engine_args.enforce_eager:
            made.mode = CompilationMode.DYNAMO_TRACE_ONCE  # the one that vLLM has for CPUs
            return
    if "none" not in asked.custom_ops:
        made.custom_ops = ["all" if name == "none" else name for name in made.custom_ops]
        # vLLM's operator is wrong for DeepSeek's queries, which are [tokens, heads, width].
        if hasattr(vllm_config.model_config.hf_text_config, "qk_rope_head_dim"):
            made.custom_ops.append("-rotary_embedding")
