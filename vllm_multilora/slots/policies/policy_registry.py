"""Finds a policy by its name: built in, from an entry point, or `module:Class`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from vllm_multilora.slots.policies.aging import GdsfPolicy, LfuPolicy
from vllm_multilora.slots.policies.lru import LruPolicy
from vllm_multilora.slots.policies.policy import CachePolicy, PolicyError
from vllm_multilora.slots.policies.slru import SlruPolicy
from vllm_multilora.wording import guess

ENTRY_POINT_GROUP = "vllm_multilora.cache_policies"
METHODS = ("added", "used", "removed", "victim")
BUILT_IN: dict[str, type[CachePolicy]] = {
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "slru": SlruPolicy,
    "gdsf": GdsfPolicy,
}


def _installed() -> dict[str, EntryPoint]:
    """The policies of installed packages by name; built-in names cannot be taken over."""
    found = entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in found if point.name not in BUILT_IN}


def policy_names() -> tuple[str, ...]:
    """The names that `make_policy` knows: the built-in ones, then those of installed packages."""
    return (*BUILT_IN, *sorted(_installed()))


def make_policy(name: str) -> CachePolicy:
    """A new policy of that name.

    Args:
        name: A built-in name, the name of an entry point of group `vllm_multilora.cache_policies`,
            or `module:Class` (any callable that takes no arguments).

    Raises:
        PolicyError: No such policy, it cannot be imported or made, or it lacks methods.
    """
    factory = _find(name)
    try:
        policy = factory()
    except Exception as error:
        raise PolicyError(
            f"cache policy {name!r} cannot be made without arguments: "
            f"{type(error).__name__}: {error}"
        ) from error
    lacking = [method for method in METHODS if not callable(getattr(policy, method, None))]
    if lacking:
        raise PolicyError(
            f"cache policy {name!r} ({type(policy).__name__}) lacks the method"
            f"{'s' if len(lacking) > 1 else ''} {', '.join(lacking)}; "
            "vllm_multilora.slots.CachePolicy says what each must do"
        )
    return policy


def _find(name: str) -> Callable[[], CachePolicy]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" in name:
        return _import(name)
    installed = _installed()
    if name in installed:
        try:
            return cast(Callable[[], CachePolicy], installed[name].load())
        except Exception as error:
            raise PolicyError(
                f"cache policy {name!r}: its entry point {installed[name].value!r} cannot be "
                f"imported: {type(error).__name__}: {error}"
            ) from error
    known = (*BUILT_IN, *sorted(installed))
    raise PolicyError(
        f"unknown cache policy {name!r}{guess(name, known)} (known: {', '.join(known)}; or give "
        "module:Class)"
    )


def _import(path: str) -> Callable[[], CachePolicy]:
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise PolicyError(f"cache policy {path!r} must be a name or module:Class")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise PolicyError(
            f"cache policy {path!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(factory):
        raise PolicyError(
            f"cache policy {path!r} must be a class, found {type(factory).__name__} {factory!r}"
        )
    return cast(Callable[[], CachePolicy], factory)
