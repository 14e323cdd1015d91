"""Whether the Triton backend can run here, decided without importing Triton until it is used."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

INTERPRET_VARIABLE = "TRITON_INTERPRET"


class TritonUnavailableError(RuntimeError):
    """The Triton backend cannot run here; the message says what to do."""


@lru_cache
def is_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def require(device_type: str) -> None:
    """Imports the backend for a device.

    Args:
        device_type: `cuda` (ROCm included), or `cpu` for Triton's interpreter.

    Raises:
        ValueError: Triton does not run on this type of device.
        TritonUnavailableError: Triton is missing, or is not in the mode that the device needs.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(
            f"the triton backend runs on CUDA and ROCm devices (and in Triton's interpreter on "
            f"CPU tensors), not on {device_type}"
        )
    if not is_installed():
        raise TritonUnavailableError(
            "the triton backend needs Triton: pip install 'triton>=3.6,<3.10', or choose the "
            "backend 'torch'"
        )
    from multilora_kernels import triton

    if _language_is_interpreted() != triton.INTERPRETED:
        interpreted, compiled = "these kernels were", "Triton itself was"
        if not triton.INTERPRETED:
            interpreted, compiled = compiled, interpreted
        raise TritonUnavailableError(
            f"{interpreted} imported with {INTERPRET_VARIABLE}=1 and {compiled} without it, so "
            f"that neither mode works: set or unset it before anything imports Triton (torch and "
            f"vLLM do), best where the process is started"
        )
    if device_type == "cpu" and not triton.INTERPRETED:
        found = os.environ.get(INTERPRET_VARIABLE, "not set")
        raise TritonUnavailableError(
            f"on CPU tensors the triton backend runs in Triton's interpreter only, for tests: "
            f"{INTERPRET_VARIABLE}=1 must be set before Triton is first imported (it is {found} "
            f"now); otherwise choose the backend 'native' or 'torch'"
        )
    if device_type == "cuda" and triton.INTERPRETED:
        raise TritonUnavailableError(
            f"Triton was imported with {INTERPRET_VARIABLE}=1, which runs kernels on the CPU: "
            f"unset it and start again"
        )


def _language_is_interpreted() -> bool:
    """Whether Triton's own functions run in the interpreter: decided as Triton is imported."""
    import triton.language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(triton.language.cdiv, InterpretedFunction)
