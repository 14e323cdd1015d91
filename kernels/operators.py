"""The operators of the library `multilora`, which compiled code calls and does not look into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("multilora", "DEF")


def register(name: str, function: Callable[..., None], mutated: str) -> Any:
    """Makes an operator of a function that changes one of its arguments and returns nothing.

    Args:
        name: Of the operator, in the library.
        function: Its arguments are annotated; schemas know tensors, numbers, text and lists.
        mutated: The argument that it changes.

    Returns:
        The operator.
    """
    _library.define(name + torch.library.infer_schema(function, mutates_args=[mutated]))
    _library.impl(name, function, "CompositeExplicitAutograd")
    _library._register_fake(name, lambda *args: None)
    return getattr(torch.ops.multilora, name).default
