"""What a choice of kernels holds for: the card, its driver, the libraries and settings."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from multilora_kernels import triton_availability
from vllm_multilora.integration.patching.version import installed_version

_DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
_VARIABLES = (
    "TRITON_INTERPRET",
    "VLLM_BATCH_INVARIANT",
    "VLLM_LORA_DISABLE_PDL",
    "VLLM_LORA_ENABLE_DUAL_STREAM",
    "VLLM_TUNED_CONFIG_FOLDER",
)
"""Environment variables that change which kernels run, or how."""


def trial_facts(device: torch.device, *, max_tokens: int, backend: str) -> dict[str, str]:
    """The facts by name; a choice is used again only where all of them are the same.

    Args:
        device: Where the model runs.
        max_tokens: The largest number of rows of a step.
        backend: The kernels that serve unless others are chosen.
    """
    facts = {
        "card": card_name(device),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": _triton(),
        "vLLM": str(installed_version()),
        "kernels": backend,
        "rows": str(max_tokens),
    }
    if device.type == "cuda":
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def card_name(device: torch.device) -> str:
    """The card's name; for tests without one, Triton's interpreter."""
    if device.type != "cuda":
        return "Triton's interpreter"
    return torch.cuda.get_device_name(device)


def _driver() -> str:
    for path in map(Path, _DRIVERS):
        if path.is_file():
            return path.read_text().partition("\n")[0]
    return "unknown"


def _triton() -> str:
    if not triton_availability.is_installed():
        return "none"
    import triton

    return str(triton.__version__)
