"""`vllm-multilora doctor --against`: what another version of vLLM would mean for the plugin."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import vllm_multilora.integration
from vllm_multilora.integration.offline.source import Source, is_vllms
from vllm_multilora.integration.patching.extended import EXTENDED
from vllm_multilora.integration.patching.ledger import PATCHES
from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.patching.version import SUPPORTED_TEXT, is_supported


@dataclass(frozen=True)
class Finding:
    """One thing of vLLM's that the plugin counts on.

    Attributes:
        what: The patch's name, the class that is extended, or the module of ours that imports it.
        target: The thing, as `module:name`.
        problem: What is not as the plugin knows it; empty if all is.
    """

    what: str
    target: str
    problem: str


def judge(path: Path) -> int:
    """Compares a vLLM's source with what the plugin knows, and prints what differs.

    Args:
        path: A wheel, or a folder with vLLM's package.

    Returns:
        0 if everything is as in the supported versions, 1 otherwise.

    Raises:
        ConfigError: There is no vLLM at `path`.
    """
    source = Source.open(path)
    patches = [_of_patch(source, p) for p in PATCHES if is_vllms(p.module)]
    others = [*_of_extended(source), *_of_imports(source)]
    support = "supported" if is_supported(source.version) else f"supported: {SUPPORTED_TEXT}"
    print(f"vLLM            {source.version or 'of no known version'} ({support}), at {path}")
    for title, findings in (("patches", patches), ("methods and imports", others)):
        print(title)
        for finding in findings:
            if finding.problem or title == "patches":
                state = "DIFFERS" if finding.problem else "as known"
                print(f"  {state:9} {finding.what:26} {finding.target}")
            if finding.problem:
                print(f"            {finding.problem}")
        print(f"  {sum(not f.problem for f in findings)} of {len(findings)} as known")
    if any(finding.problem for finding in (*patches, *others)):
        print("\nThe plugin would not act everywhere as it does in the versions that it knows.")
        return 1
    print("\nEverything that the plugin changes or uses is as in the versions that it knows.")
    return 0


def _of_patch(source: Source, patch: Patch) -> Finding:
    name = patch.target.partition(":")[2]
    return Finding(patch.name, patch.target, _problem(source, patch.module, name, patch.takes))


def _problem(source: Source, module: str, name: str, takes: Sequence[str]) -> str:
    if not source.has_module(module):
        return f"there is no module {module}"
    found = source.find(module, name)
    if found is None:
        return f"{module} has no {name}"
    if found.is_imported or found.parameters in takes:
        return ""
    taken = "no parameters of its own" if found.parameters is None else f"({found.parameters})"
    return f"takes {taken}; expected " + " or ".join(f"({each})" for each in takes)


def _of_extended(source: Source) -> Iterator[Finding]:
    for target, methods in EXTENDED.items():
        module, _, owner = target.partition(":")
        for method, parameters in methods.items():
            name = f"{owner}.{method}"
            problem = _problem(source, module, name, (parameters,))
            yield Finding(owner, f"{module}:{name}", problem)


def _of_imports(source: Source) -> Iterator[Finding]:
    """Every name that the integration imports from vLLM, but for type checkers alone."""
    folder = Path(vllm_multilora.integration.__file__).parent
    for file in sorted(folder.rglob("*.py")):
        what = str(file.relative_to(folder))
        for node in _executed(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if is_vllms(alias.name):
                        known = source.has_module(alias.name)
                        problem = "" if known else f"there is no module {alias.name}"
                        yield Finding(what, alias.name, problem)
            elif isinstance(node, ast.ImportFrom) and is_vllms(node.module or ""):
                module = node.module or ""
                for alias in node.names:
                    known = source.find(module, alias.name) is not None
                    problem = "" if known else f"{module} has no {alias.name}"
                    yield Finding(what, f"{module}:{alias.name}", problem)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a module that run: not what `if TYPE_CHECKING` hides."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _executed(node)
