"""The house rules: lower floors never import higher ones, and one package touches vLLM."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("multilora_kernels",),
    ("vllm_multilora.errors", "vllm_multilora.config"),
    ("vllm_multilora.adapters",),
    ("vllm_multilora.cache",),
    (
        "vllm_multilora.metrics",
        "vllm_multilora.planning",
        "vllm_multilora.routing",
        "vllm_multilora.operations",
    ),
    ("vllm_multilora.integration",),
    ("vllm_multilora.plugin", "vllm_multilora.cli"),
)
PACKAGES = {"multilora_kernels": ROOT / "kernels", "vllm_multilora": ROOT / "vllm_multilora"}


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), file


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def floor_of(name: str) -> int | None:
    return next((i for i, floor in enumerate(FLOORS) if any(is_in(name, p) for p in floor)), None)


MODULES = dict(modules())


@pytest.mark.parametrize("name", MODULES)
def test_only_the_integration_package_imports_vllm(name):
    if not is_in(name, "vllm_multilora.integration"):
        assert not {i for i in imports_of(MODULES[name]) if is_in(i, "vllm")}


@pytest.mark.parametrize("name", MODULES)
def test_no_module_imports_a_higher_floor(name):
    own = floor_of(name)
    if name == "vllm_multilora":  # the package itself: only its version lives there
        assert not imports_of(MODULES[name])
        return
    assert own is not None, f"{name} has no floor; add it to FLOORS"
    higher = {i for i in imports_of(MODULES[name]) if (floor_of(i) or 0) > own}
    assert not higher


def test_every_patch_of_vllm_is_in_the_ledger():
    """Attributes of vLLM's modules and classes are assigned in one place only."""
    for name, file in MODULES.items():
        source = file.read_text()
        if name != "vllm_multilora.integration.patching":
            assert "setattr(" not in source, f"{name} sets attributes by name"
