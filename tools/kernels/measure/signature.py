"""What Triton's compiler is asked for when a launch is started: types, constants, alignments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from multilora_kernels.triton.launch import Launch

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}


def specialise(
    launch: Launch,
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments, as Triton finds them when the kernel is launched."""
    names = launch.kernel.arg_names
    params = launch.kernel.params
    fixed = {p.name for p in params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    signature: dict[str, Any] = dict.fromkeys(launch.constants, "constexpr")
    constants: dict[tuple[int, ...], Any] = {
        (names.index(name),): value for name, value in launch.constants.items()
    }
    attributes: dict[tuple[int, ...], Any] = {}

    for number, param in enumerate(params):
        if param.has_default and param.name not in launch.arguments | launch.constants:
            signature[param.name] = "constexpr"
            constants[number,] = param.default

    def describe(value: Any, path: tuple[int, ...], special: bool) -> Any:
        if value is None:
            constants[path] = None
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(v, (*path, i), special) for i, v in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if special and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return f"*{_TYPES[value.dtype]}"
        if special and value == 1:
            constants[path] = 1
            return "constexpr"
        return "i32" if value < 2**31 else "i64"

    for name, value in launch.arguments.items():
        signature[name] = describe(value, (names.index(name),), name not in fixed)
    return {name: signature[name] for name in names}, constants, attributes


def pointers_of(signature: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """The tensor, and the type of its elements, for each parameter that is a pointer."""

    def leaves(kind: Any) -> Iterator[str]:
        if isinstance(kind, tuple):
            for each in kind:
                yield from leaves(each)
        elif kind != "constexpr":
            yield kind

    parameters = [(name, leaf) for name, kind in signature.items() for leaf in leaves(kind)]
    return {
        number: (name, leaf.removeprefix("*"))
        for number, (name, leaf) in enumerate(parameters)
        if leaf.startswith("*")
    }
