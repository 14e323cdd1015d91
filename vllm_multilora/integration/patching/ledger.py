"""The ledger: every change that this plugin makes to vLLM, in one table of two parts.

`core_seams.py` has what LoRA serving needs, `gateway_seams.py` what HTTP, keys and tenants need.
All patches are put in place when vLLM loads its plugins, in every process, before any setting
is known; in modules that the process has not imported yet, as soon as it does. Each handler asks
`activation.py` whether the plugin acts for the engine at hand and otherwise calls vLLM's original,
so that without LoRA, with `--no-multilora` or with an unsupported vLLM everything runs as if the
package were not installed.
"""

from __future__ import annotations

from collections.abc import Container

from vllm_multilora.integration.patching.core_seams import CORE
from vllm_multilora.integration.patching.gateway_seams import GATEWAY
from vllm_multilora.integration.patching.patch import Patch

PATCHES: tuple[Patch, ...] = (*CORE, *GATEWAY)


def apply_patches() -> None:
    """Puts every patch in place, now or as soon as its target is imported; safe to call again."""
    for patch in PATCHES:
        patch.apply_on_import()


def missing(names: Container[str]) -> list[str]:
    """Which of some patches cannot be put in place; imports the modules of their targets."""
    return [patch.name for patch in PATCHES if patch.name in names and not patch.apply()]
