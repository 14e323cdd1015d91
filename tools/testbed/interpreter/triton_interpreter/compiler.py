"""The compiler that Triton wants of every backend; the interpreter never asks it."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpreterBackend(BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target.backend == "cpu"

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: Any) -> NoReturn:
        raise RuntimeError("this backend compiles nothing: set TRITON_INTERPRET=1")

    def add_stages(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.parse_options(None)

    def load_dialects(self, context: Any) -> None:
        pass

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}

    def get_codegen_implementation(self, *args: Any) -> dict[str, Any]:
        return {}
