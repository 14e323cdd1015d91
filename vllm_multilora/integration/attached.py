"""State and methods that the plugin attaches to vLLM's objects, each item of state under a name.

An executor, an engine core or an API server lives as long as what belongs to it, but vLLM has no
place for a plugin's state. Everything that is kept with such an object is in one attribute of it, a
mapping by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_T = TypeVar("_T")


class Attached(Generic[_T]):
    """One thing that an object of vLLM's may have with it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get(self, owner: Any) -> _T | None:
        """What the object has; None if nothing was set."""
        return getattr(owner, "vllm_multilora", {}).get(self._name)

    def set(self, owner: Any, value: _T) -> None:
        """Keeps something with the object, in the place of what it had before."""
        if not hasattr(owner, "vllm_multilora"):
            owner.vllm_multilora = {}
        owner.vllm_multilora[self._name] = value

    def get_or_make(self, owner: Any, make: Callable[[], _T]) -> _T:
        """What the object has; what `make` returns, from then on, where nothing was set."""
        if not self.is_set(owner):
            self.set(owner, make())
        return owner.vllm_multilora[self._name]

    def is_set(self, owner: Any) -> bool:
        """Whether anything was set, None included."""
        return self._name in getattr(owner, "vllm_multilora", {})


def in_own_class(thing: _T, *bases: type, **members: Any) -> _T:
    """The same object in a class made from its own: whoever holds either sees one state.

    Args:
        thing: Any object with a `__dict__`.
        bases: Classes that come before the object's.
        members: What the class has besides.
    """
    kind = type(thing)
    made: Any = type(kind.__name__, (*bases, kind), {"__module__": kind.__module__, **members})
    known: _T = made.__new__(made)
    known.__dict__ = thing.__dict__
    return known
