"""The operators of the library `multilora`, which compiled code calls and does not look into."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch

_library = torch.library.Library("multilora", "DEF")

T = TypeVar("T")


def register(name: str, function: Callable[..., None], mutated: str) -> Any:
    """Makes an operator of a function that changes one of its arguments and returns nothing.

    Args:
        name: Of the operator, in the library.
        function: Its arguments are annotated; schemas know tensors, numbers, text and lists.
        mutated: The argument that it changes.

    Returns:
        The operator.
    """
    return _define(name, function, [mutated], lambda *args: None)


def register_pure(
    name: str, function: Callable[..., torch.Tensor], shaped: Callable[..., torch.Tensor]
) -> Any:
    """Makes an operator of a function that changes nothing and returns a tensor.

    Args:
        name: Of the operator, in the library.
        function: As for `register`.
        shaped: With the same arguments, returns a tensor of that shape with any values.

    Returns:
        The operator.
    """
    return _define(name, function, [], shaped)


def _define(
    name: str, function: Callable[..., Any], mutated: list[str], shaped: Callable[..., Any]
) -> Any:
    _library.define(name + torch.library.infer_schema(function, mutates_args=mutated))
    _library.impl(name, function, "CompositeExplicitAutograd")
    _library._register_fake(name, shaped)
    return getattr(torch.ops.multilora, name).default


class Numbered(Generic[T]):
    """Layers that compiled code names by a number, which comes in a tensor.

    Compiled code that is kept from process to process, or shared by several engines of one, then
    holds no other engine's layers. They are not kept here.
    """

    def __init__(self) -> None:
        self._numbers = count(1)  # none is used again
        self._layers: WeakValueDictionary[int, T] = WeakValueDictionary()

    def number(self, layer: T) -> torch.Tensor:
        """The number of a layer from now on."""
        number = next(self._numbers)
        self._layers[number] = layer
        return torch.tensor([number])

    def layer(self, number: torch.Tensor) -> T:
        """The layer of a number.

        Raises:
            RuntimeError: It is gone.
        """
        value: Any = number.item()
        found = self._layers.get(value)
        if found is None:
            raise RuntimeError(
                f"compiled code asks for prepared layer {value}, which is gone: what was prepared "
                "must be kept as long as the code that was compiled with it"
            )
        return found
