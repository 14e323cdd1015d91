"""`vllm-multilora doctor --against`: what another version of vLLM would mean for the plugin."""

from __future__ import annotations

from pathlib import Path

from vllm_multilora.integration.patching.parts import TOOLS
from vllm_multilora.integration.patching.seams import SeamFinding, Seams
from vllm_multilora.integration.patching.source import VllmSource
from vllm_multilora.integration.patching.tables.attributes import TOOL_ATTRIBUTES
from vllm_multilora.integration.patching.tables.ledger import SEAMS

_ALL = (*SEAMS, Seams(TOOLS, (), attributes=TOOL_ATTRIBUTES))


def judge(path: Path) -> int:
    """Compares a vLLM's source with what the plugin knows, and prints what differs.

    Returns:
        0 if everything is as in the tested versions, 1 otherwise.

    Raises:
        ConfigError: There is no vLLM at `path`.
    """
    source = VllmSource.open(path)
    print(f"vLLM            {source.version or 'of no known version'}, at {path}")
    are_whole = [_judge_part(source, seams) for seams in _ALL]
    if all(are_whole):
        print("\nEverything that the plugin changes or uses is as in the versions that it knows.")
        return 0
    print()
    for seams, is_whole in zip(_ALL, are_whole, strict=True):
        if not is_whole:
            print(f"With this vLLM, if it is newer, {seams.part.what} would not act.")
    return 1


def _judge_part(source: VllmSource, seams: Seams) -> bool:
    """Prints how a vLLM has what one part needs; returns whether it has all of it."""
    part = seams.part
    state = "tested" if part.is_tested(source.version) else f"tested: {part.tested}"
    print(f"{part.name}: {part.what} ({state})")
    replaced, others = seams.findings_of_patches(source), seams.other_findings(source)
    _show("patches", replaced, with_known=True)
    _show("methods, imports and private attributes", others, with_known=False)
    return not any(finding.problem for finding in (*replaced, *others))


def _show(title: str, findings: list[SeamFinding], *, with_known: bool) -> None:
    for finding in findings:
        if finding.problem or with_known:
            state = "DIFFERS" if finding.problem else "as known"
            print(f"  {state:9} {finding.what:26} {finding.target}")
        if finding.problem:
            print(f"            {finding.problem}")
    known = sum(not finding.problem for finding in findings)
    print(f"  {title}: {known} of {len(findings)} as known")
