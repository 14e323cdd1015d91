"""What one part of the plugin counts on in vLLM, and whether a vLLM has it in the known shape.

`vllm-multilora doctor --against` asks this of any vLLM, and `decision.py` of the installed one. It
is read from vLLM's source: nothing is imported for it.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import vllm_multilora.integration
from vllm_multilora.integration.patching.parts import Part, part_of
from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.patching.source import VllmSource, is_vllms
from vllm_multilora.integration.patching.version import is_expected

_FOLDER = Path(vllm_multilora.integration.__file__).parent


@dataclass(frozen=True)
class SeamFinding:
    """One thing of vLLM's that the plugin counts on."""

    what: str  # the patch's name, the class that is extended, or the module of ours that imports it
    target: str  # as `module:name`
    problem: str  # what is not as the plugin knows it; empty if all is


@dataclass(frozen=True, eq=False)
class Seams:
    """Everything of vLLM's that one part of the plugin replaces, overrides, imports or reads.

    Attributes:
        part: The part.
        patches: What it replaces.
        overrides: By class of vLLM's, its methods that classes of ours override or call, and the
            methods' parameters.
        attributes: Private attributes that it reads, as `module:Class.attribute`.
    """

    part: Part
    patches: tuple[Patch, ...]
    overrides: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    attributes: tuple[str, ...] = ()

    def missing(self, names: Container[str]) -> list[str]:
        """Which of some patches cannot be put in place; imports the modules of their targets."""
        return [patch.name for patch in self.patches if patch.name in names and not patch.apply()]

    def findings_of_patches(self, source: VllmSource) -> list[SeamFinding]:
        """How a vLLM's source has what the patches replace, in the order of the table."""
        return [
            SeamFinding(each.name, each.target, _problem(source, each.target, each.takes))
            for each in self.patches
            if is_vllms(each.module) and is_expected(each.target, source.version)
        ]

    def other_findings(self, source: VllmSource) -> list[SeamFinding]:
        """How a vLLM's source has what is overridden, imported and read."""
        return [
            *self._of_overrides(source),
            *self._of_imports(source),
            *self._of_attributes(source),
        ]

    def problems(self, source: VllmSource) -> list[SeamFinding]:
        """Everything that is not as this part knows it."""
        found = [*self.findings_of_patches(source), *self.other_findings(source)]
        return [finding for finding in found if finding.problem]

    def _of_overrides(self, source: VllmSource) -> Iterator[SeamFinding]:
        for target, methods in self.overrides.items():
            owner = target.partition(":")[2]
            for method, parameters in methods.items():
                if not is_expected(f"{target}.{method}", source.version):
                    continue
                problem = _problem(source, f"{target}.{method}", (parameters,))
                yield SeamFinding(owner, f"{target}.{method}", problem)

    def _of_attributes(self, source: VllmSource) -> Iterator[SeamFinding]:
        for target in self.attributes:
            module, _, name = target.partition(":")
            problem = "" if source.has(module, name) else f"{module} has no {name}"
            yield SeamFinding("private attribute", target, problem)

    def _of_imports(self, source: VllmSource) -> Iterator[SeamFinding]:
        """Every name that this part's modules import from vLLM, but for type checkers alone."""
        for file in sorted(_FOLDER.rglob("*.py")):
            path = file.relative_to(_FOLDER)
            module = ".".join(("vllm_multilora.integration", *path.with_suffix("").parts))
            if part_of(module) is not self.part:
                continue
            for node in _executed(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        if is_vllms(alias.name):
                            known = source.has_module(alias.name)
                            problem = "" if known else f"there is no module {alias.name}"
                            yield SeamFinding(str(path), alias.name, problem)
                elif isinstance(node, ast.ImportFrom) and is_vllms(node.module or ""):
                    module = node.module or ""
                    for alias in node.names:
                        known = source.find(module, alias.name) is not None
                        problem = "" if known else f"{module} has no {alias.name}"
                        yield SeamFinding(str(path), f"{module}:{alias.name}", problem)


def _problem(source: VllmSource, target: str, takes: Sequence[str]) -> str:
    module, _, name = target.partition(":")
    if not source.has_module(module):
        return f"there is no module {module}"
    found = source.find(module, name)
    if found is None:
        return f"{module} has no {name}"
    if found.is_imported or found.parameters in takes:
        return ""
    taken = "no parameters of its own" if found.parameters is None else f"({found.parameters})"
    return f"takes {taken}; expected " + " or ".join(f"({each})" for each in takes)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module that run: not what `if TYPE_CHECKING` hides."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _executed(node)
