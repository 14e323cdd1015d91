"""Runs a function as soon as a module has been imported, by whomever, if ever.

A vLLM process needs only some of vLLM's modules. A change to a module that this process may never
use waits here, so that the module is not imported just for the change.
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_Action = Callable[[], object]


def when_imported(module: str, action: _Action) -> None:
    """Calls a function once a module has been imported: now, or when that happens.

    It is called before the import returns, so that nobody gets hold of a name in the module
    earlier. A module that cannot be found is none to wait for: then it is called now as well.
    """
    if module not in sys.modules and _can_be_found(module):
        _finder.expect(module, action)
        # Another thread may have begun to import it before it was expected.
        if module not in sys.modules:
            return
    if module in sys.modules:
        importlib.import_module(module)  # waits for a thread that is about to execute it
    action()


def _can_be_found(module: str) -> bool:
    """Whether there is such a module, found without executing it or its packages."""
    path: Sequence[str] | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        loaded = sys.modules.get(name)
        if loaded is not None:
            path = getattr(loaded, "__path__", None)
        elif (spec := _spec(name, path)) is not None:
            path = spec.submodule_search_locations
        else:
            return False
    return True


def _spec(
    name: str, path: Sequence[str] | None, target: ModuleType | None = None
) -> ModuleSpec | None:
    """What Python's other finders say of a module."""
    for finder in sys.meta_path:
        find: Any = getattr(finder, "find_spec", None)
        if finder is not _finder and find is not None:
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                return spec
    return None


class _Finder(MetaPathFinder):
    """Finds expected modules as the other finders do, and watches their execution."""

    def __init__(self) -> None:
        self._expected: dict[str, list[_Action]] = {}
        # Guards `_expected` and the place in `sys.meta_path`.
        self._lock = threading.Lock()

    def expect(self, module: str, action: _Action) -> None:
        with self._lock:
            self._expected.setdefault(module, []).append(action)
            if self not in sys.meta_path:
                sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._expected:
            return None
        spec = _spec(name, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _WatchingLoader(spec.loader)  # type: ignore[arg-type]
        return spec

    def executed(self, module: str) -> None:
        """Calls what waited for a module."""
        with self._lock:
            actions = self._expected.pop(module, [])
        for action in actions:
            try:
                action()
            except Exception:
                # An import of vLLM's must not fail for what somebody else wants to do with it.
                logger.exception("A change of %s could not be made; it stays as it is.", module)


class _WatchingLoader(Loader):
    """Stands in for a module's loader until the module is executed."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Whoever looks at the module, its own code included, sees its true loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _finder.executed(module.__name__)


_finder = _Finder()
