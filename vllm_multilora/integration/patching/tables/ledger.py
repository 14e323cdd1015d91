"""The ledger: every change that this plugin makes to vLLM, in one table of two parts.

`core_seams.py` has what LoRA serving needs, `gateway_seams.py` what HTTP, keys and tenants need.
All patches are put in place when vLLM loads its plugins, in every process, before any setting
is known; in modules that the process has not imported yet, as soon as it does. Each handler asks
whether its part acts for the engine at hand (`activation.py`,
`server/settings/gateway_activation.py`) and otherwise calls vLLM's original. So without LoRA, with
`--no-multilora` or with a vLLM that a part does not fit, everything runs as if the package were not
installed.
"""

from __future__ import annotations

from vllm_multilora.integration.patching.patch import Patch
from vllm_multilora.integration.patching.tables.core_seams import CORE_SEAMS
from vllm_multilora.integration.patching.tables.gateway_seams import GATEWAY_SEAMS

SEAMS = (CORE_SEAMS, GATEWAY_SEAMS)
PATCHES: tuple[Patch, ...] = (*CORE_SEAMS.patches, *GATEWAY_SEAMS.patches)


def apply_patches() -> None:
    """Puts every patch in place, now or as soon as its target is imported; safe to call again."""
    for patch in PATCHES:
        patch.apply_on_import()
