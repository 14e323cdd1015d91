"""A Triton backend named "cpu" for Triton's interpreter, and gaps of the interpreter closed.

Kernels of vLLM's samplers call `.to(...)` on the counter of a loop over `tl.range`, a plain int in
the interpreter; load with masks that `&` has made of several types, which numpy refuses; and ask
`libdevice.isnan` and `log1p`, which only compilers know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_INTERPRETER = "triton.runtime.interpreter"
_LIBDEVICE = "triton.language.extra.libdevice"


class _Counter(int):
    """A loop's counter that can be converted, as a compiled kernel's can."""

    def to(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return sys.modules[_INTERPRETER]._implicit_cvt(int(self)).to(dtype)


def _mend_interpreter(interpreter: Any) -> None:
    patch_language = interpreter._patch_lang_core

    def with_counters(language: Any, scope: Any) -> None:
        patch_language(language, scope)
        plain = language.range

        def counters(*args: Any, **kwargs: Any) -> Iterator[_Counter]:
            return map(_Counter, plain(*args, **kwargs))

        scope.set_attr(language, "range", counters)

    interpreter._patch_lang_core = with_counters

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), interpreter.tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        return load(self, pointers, boolean(mask), *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, boolean(mask), *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store


def _mend_libdevice(libdevice: Any) -> None:
    libdevice.isnan = lambda x: x != x
    libdevice.log1p = _log1p


def _log1p(x: Any) -> Any:
    language: Any = sys.modules["triton.language"]
    # Where 1 + x rounds to 1, its logarithm is lost.
    return language.where(language.abs(x) < 1e-4, x - x * x / 2, language.log(1.0 + x))


_MEND = {_INTERPRETER: _mend_interpreter, _LIBDEVICE: _mend_libdevice}


class _Finder(MetaPathFinder):
    """Mends a module as soon as it has been imported; Triton finds us before that."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _MEND:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_mend(module: ModuleType) -> None:
            execute(module)
            _MEND[name](module)

        loader.exec_module = execute_and_mend
        return spec


for _name, _mend in _MEND.items():
    if _name in sys.modules:
        _mend(sys.modules[_name])
sys.meta_path.insert(0, _Finder())
