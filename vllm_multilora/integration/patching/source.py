"""Finds definitions in the source of a vLLM that is not installed, without executing it."""

from __future__ import annotations

import ast
import platform
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from vllm_multilora.errors import ConfigError

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_PACKAGE = "vllm/__init__.py"
_EXPECTED = (
    "a wheel (from `pip download --no-deps vllm==VERSION`), or a folder with vLLM's package `vllm` "
    "in it, such as a checkout"
)
_MAX_HOPS = 12  # from a name that is imported to where it is defined


@dataclass(frozen=True)
class CodeDefinition:
    """What a name stands for.

    Attributes:
        parameters: Those of a function, or of a class's `__init__`, as they are written, without
            annotations; None for anything else.
        is_imported: Whether vLLM has it from another package, whose source is not here.
    """

    parameters: str | None
    is_imported: bool = False


class VllmSource:
    """The modules of a vLLM, as text."""

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = read
        self._parsed = cache(self._parse)

    @classmethod
    def open(cls, path: Path) -> VllmSource:
        """Opens a wheel, or a folder that has vLLM's package, or is it.

        Raises:
            ConfigError: It is neither.
        """
        if not path.exists():
            raise ConfigError(f"{path} does not exist: expected {_EXPECTED}")
        read = _from_wheel(path) if path.is_file() else partial(_text, path)
        if path.is_dir() and path.name == "vllm" and read(_PACKAGE) is None:
            read = partial(_text, path.parent)
        if read(_PACKAGE) is None:
            raise ConfigError(f"{path} contains no vLLM: expected {_EXPECTED}")
        return cls(read)

    @property
    def version(self) -> str:
        """What the source calls itself; empty in a checkout, which says nothing."""
        found = re.search(r"""version = ['"]([^'"]+)""", self._read("vllm/_version.py") or "")
        return found[1] if found else ""

    def has_module(self, module: str) -> bool:
        """Whether there is such a module or package."""
        return self._parsed(module) is not None

    def find(self, module: str, name: str) -> CodeDefinition | None:
        """Finds a module's name, such as `Executor.__init__`, through imports and base classes.

        Returns:
            What it stands for; None if there is no such thing.
        """
        *owners, last = name.split(".")
        found = self._in_module(module, owners[0] if owners else last, _MAX_HOPS)
        for attribute in (*owners[1:], last) if owners else ():
            where, node = found or ("", None)
            if not isinstance(node, ast.ClassDef):
                return None
            found = self._in_class(where, node, attribute, _MAX_HOPS)
        return None if found is None else self._definition(*found)

    def has(self, module: str, name: str) -> bool:
        """Whether there is such a name, or a class has such an attribute, set by its methods."""
        if self.find(module, name) is not None:
            return True
        owner, _, attribute = name.partition(".")
        found = self._in_module(module, owner, _MAX_HOPS) if attribute else None
        return found is not None and self._sets(*found, attribute, _MAX_HOPS)

    def _sets(self, module: str, owner: ast.AST, attribute: str, hops: int) -> bool:
        """Whether a method of a class, or of a class that it extends, assigns an attribute."""
        if not isinstance(owner, ast.ClassDef) or not hops:
            return False
        if any(
            isinstance(node, ast.Attribute)
            and node.attr == attribute
            and isinstance(node.ctx, ast.Store)
            and ast.unparse(node.value) == "self"
            for node in ast.walk(owner)
        ):
            return True
        bases = (ast.unparse(base).split("[")[0] for base in owner.bases)
        found = filter(None, (self._in_module(module, base, hops - 1) for base in bases))
        return any(self._sets(*base, attribute, hops - 1) for base in found)

    def _definition(self, module: str, node: ast.AST) -> CodeDefinition:
        if isinstance(node, ast.ClassDef):
            found = self._in_class(module, node, "__init__", _MAX_HOPS)
            return CodeDefinition(None) if found is None else self._definition(*found)
        if isinstance(node, _Function):
            return CodeDefinition(_parameters(node.args))
        if isinstance(node, ast.ImportFrom) and not node.level:
            return CodeDefinition(None, is_imported=not is_vllms(node.module or ""))
        return CodeDefinition(None)

    def _in_module(self, module: str, name: str, hops: int) -> tuple[str, ast.AST] | None:
        """The node that defines a name, and the module that it is in."""
        tree = self._parsed(module)
        if tree is None or not hops:
            return None
        found: tuple[str, ast.AST] | None = None
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                source = _absolute(module, node, self._is_package(module))
                for alias in node.names:
                    if alias.name == "*":
                        found = self._in_module(source, name, hops - 1) or found
                    elif (alias.asname or alias.name) == name:
                        imported = is_vllms(source)
                        found = self._in_module(source, alias.name, hops - 1) if imported else None
                        found = found or (module, node)
            elif _defines(node, name):
                found = module, node
        if found is None and self.has_module(f"{module}.{name}"):
            return module, tree
        # Names that a package finds when they are asked for.
        is_lazy = any(_defines(node, "__getattr__") for node in tree.body)
        return (module, tree) if found is None and is_lazy and _mentions(tree, name) else found

    def _in_class(
        self, module: str, owner: ast.ClassDef, name: str, hops: int
    ) -> tuple[str, ast.AST] | None:
        found = [node for node in _statements(owner.body) if _defines(node, name)]
        if found:
            return module, found[-1]
        for base in owner.bases if hops else ():
            parent = self._in_module(module, ast.unparse(base).split("[")[0], hops - 1)
            if parent is not None and isinstance(parent[1], ast.ClassDef):
                inherited = self._in_class(parent[0], parent[1], name, hops - 1)
                if inherited is not None:
                    return inherited
        return None

    def _is_package(self, module: str) -> bool:
        return self._read(f"{module.replace('.', '/')}/__init__.py") is not None

    def _parse(self, module: str) -> ast.Module | None:
        path = module.replace(".", "/")
        for name in (f"{path}.py", f"{path}/__init__.py"):
            try:
                if (text := self._read(name)) is not None:
                    return ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise ConfigError(
                    f"{name} of this vLLM cannot be read: {error}; expected a file for Python "
                    f"{platform.python_version()}, by which it is read, or older"
                ) from error
        return None


def is_vllms(module: str) -> bool:
    """Whether a module, by its full name, is one of vLLM's."""
    return module.split(".")[0] == "vllm"


def _text(folder: Path, name: str) -> str | None:
    return (folder / name).read_text() if (folder / name).is_file() else None


def _from_wheel(path: Path) -> Callable[[str], str | None]:
    if not zipfile.is_zipfile(path):
        return lambda name: None
    wheel = zipfile.ZipFile(path)
    names = frozenset(wheel.namelist())
    return lambda name: wheel.read(name).decode() if name in names else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A body's statements, those under `if`, `try` and `with` among them."""
    for node in body:
        yield node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, field, []))
        for handler in node.handlers if isinstance(node, ast.Try) else ():
            yield from _statements(handler.body)


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.ClassDef | _Function):
        return node.name == name
    if isinstance(node, ast.Assign):
        return any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id == name
    if isinstance(node, ast.Import):
        return any((alias.asname or alias.name.split(".")[0]) == name for alias in node.names)
    return False


def _mentions(tree: ast.Module, name: str) -> bool:
    return any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree))


def _absolute(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _parameters(arguments: ast.arguments) -> str:
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    return ast.unparse(arguments)
