"""What the plugin replaces on single objects of vLLM's, besides the patches of the ledger.

A patch replaces an attribute of a module or class, for everybody. Each of these replaces a method,
a function or a helper on one object, which a handler has at hand.
`tests/unit/patching/test_assignments.py` holds the table against the code. It may only get shorter:
a patch or a class of our own is seen by `vllm-multilora doctor`, and such an assignment is not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replaced:
    """One attribute of vLLM's objects that is replaced.

    Attributes:
        module: Our module that replaces it, below `vllm_multilora`.
        written: The assignment's target, as the module has it.
        target: The attribute, as `module:Class.attribute` of vLLM's or another package's.
        why: What vLLM lacks.
        until: What would make it unnecessary.
    """

    module: str
    written: str
    target: str
    why: str
    until: str


REPLACED = (
    Replaced(
        "integration.server.requests.engine_admission",
        "processor.request_states",
        "vllm.v1.engine.output_processor:OutputProcessor.request_states",
        "vLLM counts tokens of whole servers, and tells nobody which requests begin and end.",
        "vLLM counts tokens by adapter, and lets plugins refuse a request to the engine.",
    ),
    Replaced(
        "integration.worker.base_layers.base_products",
        "layer.cpu_linear",
        "vllm.model_executor.layers.utils:layer.cpu_linear",
        "See the patch base-products.",
        "See the patch base-products.",
    ),
)
"""All of them, by module."""
