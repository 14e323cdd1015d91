"""On what and with what something was measured."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Environment:
    """What a figure means nothing without.

    Attributes:
        device: Name of the card, or of the processor where there is none.
        on_gpu: Whether it is a card.
        driver: Version of the card's driver; "none" without a card.
        torch: Version of PyTorch.
        triton: Version of Triton; "not installed" without.
        date: When, in UTC.
        command: The command line.
    """

    device: str
    on_gpu: bool
    driver: str
    torch: str
    triton: str
    date: str
    command: str

    def facts(self) -> dict[str, str | bool]:
        return asdict(self)


def current_environment(device: torch.device, module: str, arguments: list[str]) -> Environment:
    """The environment of a command of the rig.

    Args:
        device: Where it measures.
        module: Such as `tools.kernels.bench`.
        arguments: What followed on the command line.
    """
    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        on_gpu=on_gpu,
        driver=_driver() if on_gpu else "none",
        torch=torch.__version__,
        triton=_version("triton"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", module, *arguments]),
    )


def command_arguments(arguments: list[str] | None) -> list[str]:
    """The arguments of a `main`: as passed, else the process's own."""
    return sys.argv[1:] if arguments is None else arguments


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return answer.stdout.split("\n", 1)[0].strip()


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
