"""How vLLM is changed: named, idempotent replacements of one attribute each."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_multilora.integration.post_import import when_imported

logger = logging.getLogger(__name__)

_MARK = "__multilora_patch__"
_patching = threading.Lock()
"""Held from looking at a target to replacing it."""


@dataclass(frozen=True)
class Patch:
    """One entry of the ledger in `patches.py`.

    Attributes:
        name: Short name, unique.
        target: What is replaced, as `module:attribute` or `module:Class.attribute`.
        why: What vLLM lacks and what the replacement does about it.
        checked: The vLLM versions whose source was read for this target.
        until: What would make the patch unnecessary.
        replace: Makes the replacement from the original, a plain function or class; static and
            class methods are unwrapped before and wrapped again after.
    """

    name: str
    target: str
    why: str
    checked: str
    until: str
    replace: Callable[[Any], Any]

    @property
    def module(self) -> str:
        """The module that the target is in."""
        return self.target.partition(":")[0]

    def _owner(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *parents, attribute = self.target.partition(":")[2].split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute

    def is_applied(self) -> bool:
        """Whether the target is replaced in this process; a module not imported yet has none."""
        if self.module not in sys.modules:
            return False
        try:
            return self._is_replaced(*self._owner())
        except (ImportError, AttributeError):
            return False

    def apply_on_import(self) -> None:
        """Replaces the target when its module is imported: now, if that has happened already.

        Where there is no such module, the log says so now, as `apply` does.
        """
        when_imported(self.module, self.apply)

    def apply(self) -> bool:
        """Replaces the target now, importing its module, if that has not happened yet.

        Returns:
            Whether the patch is in place. If the target is missing, vLLM stays as it is and
            one line in the log says so.
        """
        try:
            # Outside the lock: an import may wait for another thread's, and that one patches.
            owner, attribute = self._owner()
            with _patching:
                if not self._is_replaced(owner, attribute):
                    self._replace(owner, attribute)
        except (ImportError, AttributeError) as error:
            logger.warning(
                "vllm-multilora cannot apply its patch %r: %s is missing from this vLLM (%s). "
                "vLLM's own behaviour stays in place there.",
                self.name,
                self.target,
                error,
            )
            return False
        return True

    def _is_replaced(self, owner: Any, attribute: str) -> bool:
        return getattr(getattr(owner, attribute, None), _MARK, None) == self.name

    def _replace(self, owner: Any, attribute: str) -> None:
        original = inspect.getattr_static(owner, attribute)
        if isinstance(original, staticmethod | classmethod):
            replacement = self.replace(original.__func__)
            setattr(owner, attribute, type(original)(replacement))
        else:
            replacement = self.replace(original)
            setattr(owner, attribute, replacement)
        setattr(replacement, _MARK, self.name)
