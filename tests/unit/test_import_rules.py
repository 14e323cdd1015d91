"""Import layers, no import cycles, one place that changes vLLM, no huge class."""

import ast
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from vllm_multilora.integration.patching.parts import CORE, GATEWAY, TOOLS, part_of
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "multilora_kernels": ROOT / "kernels",
    "vllm_multilora": ROOT / "vllm_multilora",
    "tools": ROOT / "tools",
}

LAYERS = (
    ("multilora_kernels",),
    (
        "vllm_multilora.errors",
        "vllm_multilora.failures",
        "vllm_multilora.config",
        "vllm_multilora.states",
        "vllm_multilora.wording",
    ),
    ("vllm_multilora.adapters", "vllm_multilora.documents"),
    ("vllm_multilora.sources",),
    ("vllm_multilora.slots", "vllm_multilora.store"),
    ("vllm_multilora.metering",),
    (
        "vllm_multilora.metrics",
        "vllm_multilora.routing",
        "vllm_multilora.tenants",
    ),
    ("vllm_multilora.integration",),
    ("vllm_multilora.gateway",),
    ("vllm_multilora.plugin", "vllm_multilora.toolbox"),
    ("vllm_multilora.cli",),
    ("tools",),
)
"""The lowest first. A module imports from its own layer and from those below it."""

VLLM_IMPORTERS = ("vllm_multilora.integration", "vllm_multilora.gateway", "tools")

Graph = dict[str, set[str]]


def found_modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), file


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def imports_of(file: Path) -> set[str]:
    """Every name that a file imports, at any depth of its code, for type checkers included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = dict(found_modules())


@cache
def imports() -> dict[str, set[str]]:
    """The names that each module imports."""
    return {name: imports_of(file) for name, file in MODULES.items()}


def layer_of(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if any(is_in(name, p) for p in layer)), None)


def test_modules_import_only_what_their_floor_allows():
    wrong = []
    for name, imported in imports().items():
        own = layer_of(name)
        if name == "vllm_multilora":  # the package itself: only its version lives there
            own = -1
        assert own is not None, f"{name} has no layer; add it to LAYERS"
        wrong += [f"{name} imports {i}" for i in imported if (layer_of(i) or 0) > max(own, 0)]
        if not any(is_in(name, importer) for importer in VLLM_IMPORTERS):
            wrong += [f"{name} imports {i}" for i in imported if is_in(i, "vllm")]
    assert not wrong, "\n".join(sorted(wrong))


def test_the_gateway_imports_of_vllm_lora_requests_alone():
    wrong = {
        name: {each for each in imported if is_in(each, "vllm")}
        for name, imported in imports().items()
        if is_in(name, "vllm_multilora.gateway")
    }
    assert len(wrong) > 5
    allowed = {"vllm.lora.request.LoRARequest"}
    assert not {name: found for name, found in wrong.items() if not found <= allowed}


def test_nothing_imports_in_circles():
    """In every folder, the files and folders that lie in it can be put in an order."""
    graph: Graph = {}
    for name, imported in imports().items():
        for other in filter(None, map(module_of, imported)):
            if other != name:
                one, another = parts_of_one_folder(name, other)
                graph.setdefault(one, set()).add(another)
    found = circles(graph)
    assert not found, "\n".join(" - ".join(sorted(circle)) for circle in found)


def module_of(name: str) -> str | None:
    """The module of ours that an imported name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def parts_of_one_folder(one: str, another: str) -> tuple[str, str]:
    """The two files or folders, in the nearest folder that has both modules, that they lie in."""
    mine, others = _path(one), _path(another)
    same = next(i for i, (a, b) in enumerate(zip(mine, others, strict=False)) if a != b)
    return ".".join(mine[: same + 1]), ".".join(others[: same + 1])


def _path(module: str) -> tuple[str, ...]:
    is_package = MODULES[module].name == "__init__.py"
    return (*module.split("."), *(("__init__",) if is_package else ()))


def circles(graph: Graph) -> set[frozenset[str]]:
    """The largest sets of parts that all reach each other."""
    reached = {part: _reached_from(part, graph) for part in graph}
    return {
        frozenset(other for other in found if part in reached.get(other, ()))
        for part, found in reached.items()
        if part in found
    }


def _reached_from(part: str, graph: Graph) -> set[str]:
    seen: set[str] = set()
    pending = [part]
    while pending:
        new = graph.get(pending.pop(), set()) - seen
        seen |= new
        pending += new
    return seen


def test_circles_are_found():
    ring = ["a", "b", "c", "a"]
    graph: Graph = {one: {another} for one, another in pairwise(ring)}
    assert circles(graph | {"d": {"a"}}) == {frozenset("abc")}
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == set()


GATEWAY_IN_CORE = {
    ("metrics.server_counts", "metering.usage_log"),
}
"""What the core still has of the gateway: this list may only get shorter."""


def test_the_core_does_not_import_the_gateway():
    prefix = "vllm_multilora."
    found = set()
    for name, imported in imports().items():
        if name.startswith(prefix) and part_of(name) is CORE:
            ours = {m for m in map(module_of, imported) if m is not None and m.startswith(prefix)}
            others = {m.removeprefix(prefix) for m in ours if part_of(m) is not CORE}
            found |= {(name.removeprefix(prefix), other) for other in others}
    for patch in CORE_SEAMS.patches:
        handler = f"integration.{patch.handler.partition(':')[0]}"
        if part_of(handler) is GATEWAY:
            found.add((f"the patch {patch.name}", handler))
    assert not found - GATEWAY_IN_CORE, "the core may not know the gateway"
    assert not GATEWAY_IN_CORE - found, "gone: take these out of the list"


def test_every_list_of_a_parts_modules_names_modules_that_exist():
    for package in (*GATEWAY.modules, *TOOLS.modules):
        assert any(is_in(name, f"vllm_multilora.{package}") for name in MODULES), package


def test_every_patch_of_vllm_is_in_the_ledger():
    """Attributes of vLLM's modules and classes are assigned in one place only."""
    for name, file in MODULES.items():
        if name != "vllm_multilora.integration.patching.patch":
            assert "setattr(" not in file.read_text(), f"{name} sets attributes by name"


def test_no_class_has_more_than_300_lines():
    for name, file in MODULES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 300, f"{name}.{node.name} has {lines} lines"
