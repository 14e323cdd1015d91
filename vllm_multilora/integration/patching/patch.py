"""How vLLM is changed: named, idempotent replacements of one attribute each."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_multilora.integration.patching.parts import CORE, Part
from vllm_multilora.integration.patching.post_import import when_imported
from vllm_multilora.integration.patching.version import installed_version, is_expected

logger = logging.getLogger(__name__)

RUNS = ("0.29", "0.29/2", "0.30", "0.30/2", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2")
"""The vLLM versions that are tested, and with `/2` their second model runners."""

_MARK = "__multilora_patch__"
_LITERALS = (str, int, float, bool, type(None))
_OTHER_DEFAULT = 0
"""Stands for a default that is no literal where parameters are compared."""
_patching = threading.Lock()
"""Held from looking at a target to replacing it."""


@dataclass(frozen=True)
class Patch:
    """One entry of the ledger.

    Attributes:
        name: Short name, unique.
        target: What is replaced, as `module:attribute` or `module:Class.attribute`.
        handler: What is called in the target's place, as `module:function`, the module below
            `package`. It gets vLLM's original and then the call's own arguments, and is imported
            when the target is first called: the ledger alone imports nothing. A coroutine function
            where the target is one. The originals of static and class methods and of properties
            are plain functions.
        why: What vLLM lacks and what the handler does about it.
        until: What would make the patch unnecessary.
        checked: The runs, of `RUNS`, in which tests have called the handler.
        package: Where handlers are found.
        takes: The target's parameters, those of `__init__` for a class, as known versions write
            them; compared before a vLLM that is not tested is changed, and by `vllm-multilora
            doctor --against`.
        part: The part of the plugin that needs it.
    """

    name: str
    target: str
    handler: str
    why: str
    until: str
    checked: tuple[str, ...] = RUNS
    package: str = "vllm_multilora.integration"
    takes: tuple[str, ...] = ()
    part: Part = CORE

    @property
    def module(self) -> str:
        """The module that the target is in."""
        return self.target.partition(":")[0]

    def load_handler(self) -> Callable[..., Any]:
        """Imports the handler.

        Raises:
            ImportError: Its module cannot be imported, with this vLLM for instance.
            AttributeError: Its module has no such function.
        """
        module, _, function = self.handler.partition(":")
        return getattr(importlib.import_module(f"{self.package}.{module}"), function)

    def apply_on_import(self) -> None:
        """Replaces the target when its module is imported: now, if that has happened already.

        Where there is no such module, the log says so now, as `apply` does.
        """
        when_imported(self.module, self.apply)

    def apply(self) -> bool:
        """Replaces the target now, importing its module, if that has not happened yet.

        Returns:
            Whether the patch is in place, or not needed: this vLLM never had the target. If the
            target is missing, or is another one in a vLLM that is not tested, vLLM stays as it is
            and one line in the log says so, once.
        """
        if not is_expected(self.target, installed_version()):
            return True
        try:
            # Outside the lock: an import may wait for another thread's, and that one patches.
            owner, attribute = self._owner()
            with _patching:
                if self._is_replaced(owner, attribute):
                    return True
                original = inspect.getattr_static(owner, attribute)
                problem = self._misfit(original)
                if not problem:
                    self._replace(owner, attribute, original)
        except (ImportError, AttributeError) as error:
            problem = f"is missing from this vLLM ({error})"
        if problem:
            _tell(
                f"vllm-multilora cannot apply its patch {self.name!r}: {self.target} {problem}. "
                f"vLLM's own behaviour stays in place there."
            )
        return not problem

    def _owner(self) -> tuple[Any, str]:
        owner: Any = importlib.import_module(self.module)
        *parents, attribute = self.target.partition(":")[2].split(".")
        return functools.reduce(getattr, parents, owner), attribute

    def _is_replaced(self, owner: Any, attribute: str) -> bool:
        return getattr(_function_of(getattr(owner, attribute, None)), _MARK, None) == self.name

    def _misfit(self, original: Any) -> str:
        """Why a target is not the one that the handler is for; empty where it is, or must be.

        A handler stands between vLLM and its own function even where the plugin is inactive, as
        it may be in a vLLM that is not tested: it must be able to take what vLLM hands over.
        """
        if self.part.is_tested(version := installed_version()):
            return ""
        taken = _parameters(original)
        if taken is not None and taken in map(_literal_defaults, self.takes):
            return ""
        return (
            f"is not what it is in tested versions: in vLLM {version} it "
            f"{'is no function' if taken is None else f'takes ({taken})'}"
        )

    def _replace(self, owner: Any, attribute: str, original: Any) -> None:
        replacement: Any = self._replacement(_function_of(original))
        setattr(replacement, _MARK, self.name)
        is_wrapped = isinstance(original, staticmethod | classmethod | property)
        setattr(owner, attribute, type(original)(replacement) if is_wrapped else replacement)

    def _replacement(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function that looks like the original, be that a class, and calls the handler."""
        handler: Callable[..., Any] | None = None

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal handler
            if handler is None:
                handler = self._handler_or_stock()
            return handler(original, *args, **kwargs)

        async def call_async(*args: Any, **kwargs: Any) -> Any:
            return await call(*args, **kwargs)

        function = call_async if inspect.iscoroutinefunction(original) else call
        # A class's attributes are not a function's.
        updated = () if inspect.isclass(original) else functools.WRAPPER_UPDATES
        return functools.wraps(original, updated=updated)(function)

    def _handler_or_stock(self) -> Callable[..., Any]:
        """The handler; where none can be had, and need not be, what calls the original.

        Handlers import modules of vLLM's that an unknown version may have moved, and the plugin
        stays inactive there. When Python ends, nothing can be imported, and vLLM's `__del__` calls
        what it replaces.

        Raises:
            ImportError: As `load_handler`, in a vLLM that is tested.
            AttributeError: Likewise.
        """
        try:
            return self.load_handler()
        except (ImportError, AttributeError) as error:
            if sys.is_finalizing():
                return _stock
            if self.part.is_tested(installed_version()):
                raise
            logger.warning(
                "vllm-multilora cannot carry out its patch %r with vLLM %s: %s cannot be imported "
                "(%s). vLLM's own behaviour stays in place there.",
                self.name,
                installed_version(),
                self.handler,
                error,
            )
            return _stock


def _function_of(found: Any) -> Any:
    """The function in a property, or in a static or class method; others as they are."""
    if isinstance(found, property):
        return found.fget
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found


def _parameters(original: Any) -> str | None:
    """A target's parameters as `_literal_defaults` writes them; None if it is no function."""
    original = _function_of(original)
    if inspect.isclass(original):
        original = original.__init__
    try:
        signature = inspect.signature(original)
    except (TypeError, ValueError):
        return None
    parameters = [
        each.replace(
            annotation=each.empty,
            default=each.default
            if each.default is each.empty or type(each.default) in _LITERALS
            else _OTHER_DEFAULT,
        )
        for each in signature.parameters.values()
    ]
    written = signature.replace(parameters=parameters, return_annotation=signature.empty)
    return str(written)[1:-1]


def _literal_defaults(parameters: str) -> str:
    """Parameters as the ledger has them, without the defaults that only vLLM could evaluate."""
    function = ast.parse(f"lambda {parameters}: 0", mode="eval").body
    assert isinstance(function, ast.Lambda)
    arguments = function.args
    arguments.defaults = [_literal(each) for each in arguments.defaults]
    arguments.kw_defaults = [each and _literal(each) for each in arguments.kw_defaults]
    return ast.unparse(arguments)


def _literal(default: ast.expr) -> ast.expr:
    return default if isinstance(default, ast.Constant) else ast.Constant(_OTHER_DEFAULT)


@functools.cache
def _tell(problem: str) -> None:
    logger.warning("%s", problem)


def _stock(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
