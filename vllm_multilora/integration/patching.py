"""How vLLM is changed: named, idempotent replacements of one attribute each."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

_MARK = "__multilora_patch__"


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

    def _owner(self) -> tuple[Any, str]:
        module, _, path = self.target.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, attribute = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, attribute

    def is_applied(self) -> bool:
        """Whether the target is replaced in this process."""
        try:
            owner, attribute = self._owner()
        except (ImportError, AttributeError):
            return False
        return getattr(getattr(owner, attribute, None), _MARK, None) == self.name

    def apply(self) -> bool:
        """Replaces the target, if that has not happened yet.

        Returns:
            Whether the patch is in place. If the target is missing, vLLM stays as it is and
            one line in the log says so.
        """
        if self.is_applied():
            return True
        try:
            owner, attribute = self._owner()
            original = inspect.getattr_static(owner, attribute)
        except (ImportError, AttributeError) as error:
            logger.warning(
                "vllm-multilora cannot apply its patch %r: %s is missing from this vLLM (%s). "
                "vLLM's own behaviour stays in place there.",
                self.name,
                self.target,
                error,
            )
            return False
        if isinstance(original, staticmethod | classmethod):
            replacement = self.replace(original.__func__)
            setattr(owner, attribute, type(original)(replacement))
        else:
            replacement = self.replace(original)
            setattr(owner, attribute, replacement)
        setattr(replacement, _MARK, self.name)
        return True
