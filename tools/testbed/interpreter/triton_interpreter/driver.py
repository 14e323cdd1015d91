"""The driver that Triton wants of every backend: its one device is the CPU."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    """Knows the CPU and launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = self  # Triton asks a driver's utils for the properties

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "multiprocessor_count": 1,
            "max_shared_mem": 1 << 20,
            "warpSize": 32,
            "max_num_regs": 1 << 16,
        }

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_benchmarker(self) -> NoReturn:
        raise RuntimeError("the interpreter's times say nothing about a kernel")
