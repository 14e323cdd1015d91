"""Whether PyTorch finds a C++ compiler on this machine, and what is done where it does not.

On CPUs vLLM compiles the ranks of log-probabilities when the first request asks for them. Without a
compiler that step fails, and the engine ends for everybody.
"""

from __future__ import annotations

import logging

import torch

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


def compile_only_with_compiler() -> None:
    """Has this process run uncompiled what it cannot compile for its CPU.

    It is set for all of PyTorch: nothing else could be compiled either.
    """
    if problem := compiler_problem():
        torch.compiler.set_stance("force_eager")
        logger.warning(
            "torch.compile is off in this process: %s. Answers are the same. Install g++ or "
            "clang++ for the speed of compiled code.",
            problem.rstrip("."),
        )
