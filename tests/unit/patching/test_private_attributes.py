"""Every private attribute of vLLM's that our code reads is in a table that doctor checks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_multilora
from vllm_multilora.integration.patching.parts import CORE, GATEWAY, TOOLS, part_of
from vllm_multilora.integration.patching.tables.attributes import (
    CORE_ATTRIBUTES,
    GATEWAY_ATTRIBUTES,
    TOOL_ATTRIBUTES,
)
from vllm_multilora.integration.patching.tables.overrides import OVERRIDES

PACKAGE = Path(vllm_multilora.__file__).parent
PLACES = ("gateway", "integration")

NOT_VLLMS = {
    "_cdata": "PyTorch's storage",
    "_collector_to_names": "Prometheus' registry",
    "_foreach_zero_": "PyTorch",
    "_is_amx_tile_supported": "PyTorch",
    "_parameters": "PyTorch's module",
    "_type_adapter": "FastAPI's field",
}
"""Private attributes of other packages. This list may only get shorter."""

OURS = {"_choices", "_layout", "_memory", "_name", "_prepared", "_send"}
"""Private attributes of our own classes that their own modules read on other instances."""

TABLES = {
    CORE: CORE_ATTRIBUTES,
    GATEWAY: GATEWAY_ATTRIBUTES,
    TOOLS: TOOL_ATTRIBUTES,
}


def attribute(target: str) -> str:
    return target.partition(":")[2].rpartition(".")[2]


OVERRIDDEN = {name for methods in OVERRIDES.values() for name in methods}


def reads() -> Iterator[tuple[str, str]]:
    """Module and name of each private attribute that is read on another object than one's own."""
    files = sorted(file for place in PLACES for file in (PACKAGE / place).rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    own = {name for tree in trees.values() for name in _defined(tree)}
    for file, tree in trees.items():
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name, is_own = node.attr, ast.unparse(node.value) in ("self", "cls")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
                name = getattr(node.args[1], "value", "")
                is_own = False
            else:
                continue
            is_private = isinstance(name, str) and name.startswith("_") and name[:2] != "__"
            if is_private and not (is_own and name in own) and name not in OVERRIDDEN | OURS:
                yield module, name


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module's own classes have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign):
            yield getattr(node.target, "id", "") or getattr(node.target, "attr", "")
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr if ast.unparse(node.value) == "self" else ""


@pytest.mark.parametrize("part", TABLES, ids=lambda part: part.name)
def test_private_attributes_that_a_part_reads_are_in_its_table(part):
    listed = {attribute(target) for target in TABLES[part]}
    found = {name for module, name in reads() if part_of(f"vllm_multilora.{module}") is part}
    core = {attribute(target) for target in CORE_ATTRIBUTES}  # which every part may use
    unknown = found - listed - core - set(NOT_VLLMS)
    assert not unknown, "read something public, or add it to patching/tables/attributes.py"
    assert not listed - found, "no longer read: take these out of the table"


def test_private_attributes_of_other_packages_are_listed_only_while_they_are_read():
    assert set(NOT_VLLMS) <= {name for _, name in reads()}
