"""Whether a part of the plugin acts on the installed vLLM, unless a setting says otherwise."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from vllm_multilora import __version__
from vllm_multilora.errors import ConfigError
from vllm_multilora.integration.patching.seams import SeamFinding, Seams
from vllm_multilora.integration.patching.source import VllmSource
from vllm_multilora.integration.patching.version import installed_version

_MAX_NAMED = 3
"""Maximum seams that a message names; `doctor --against` lists all of them."""


def acts(seams: Seams) -> bool:
    """Whether a part acts: with a tested vLLM, and with a newer one that has all of its seams."""
    installed = installed_version()
    part = seams.part
    return part.is_tested(installed) or (part.is_newer(installed) and not misfits(seams))


@functools.cache
def misfits(seams: Seams) -> tuple[SeamFinding, ...]:
    """What of a part's seams the installed vLLM does not have in the known shape.

    It is read from vLLM's files, which takes seconds, once in a process: the result of a vLLM that
    is not tested is needed only where LoRA is on.
    """
    try:
        return tuple(seams.problems(_installed_source()))
    except ConfigError as error:
        return (SeamFinding("vllm", "vllm", str(error)),)


@functools.cache
def _installed_source() -> VllmSource:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise ConfigError("vLLM's files were not found: install vLLM as files, not as an archive")
    return VllmSource.open(Path(found.origin).parent)


def said_of(seams: Seams) -> str:
    """One sentence about a part with a vLLM that it was not tested with; empty where it was."""
    part, installed = seams.part, installed_version()
    if part.is_tested(installed):
        return ""
    found = (
        f"vllm-multilora {__version__} was tested with vLLM {part.tested} and found "
        f"{installed or 'no version'}"
    )
    if not part.is_newer(installed):
        return f"{found}: {part.what} stays as vLLM has it"
    if not (problems := misfits(seams)):
        return f"{found}: {part.what} is active, as all that it needs has the known shape there"
    named = "; ".join(f"{each.what}: {each.problem}" for each in problems[:_MAX_NAMED])
    more = f"; and {len(problems) - _MAX_NAMED} more" if len(problems) > _MAX_NAMED else ""
    return f"{found}: {part.what} stays as vLLM has it, because of {named}{more}"
