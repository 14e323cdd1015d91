"""What HTTP, names, keys, tenants, media, grammars and metering replace in vLLM.

This is the gateway's part of the seam table; mends of vLLM that serve no adapter are in it, too.
"""

from __future__ import annotations

from functools import partial

from vllm_multilora.integration.patching import patch
from vllm_multilora.integration.patching.parts import GATEWAY
from vllm_multilora.integration.patching.seams import Seams
from vllm_multilora.integration.patching.tables.attributes import GATEWAY_ATTRIBUTES

Patch = partial(patch.Patch, part=GATEWAY)

_PATCHES: tuple[patch.Patch, ...] = (
    Patch(
        name="error-texts",
        target="vllm.entrypoints.serve.exception_handling.error_response:sanitize_message",
        takes=("message",),
        handler="server.requests.http_calls:sanitize_message",
        why="vLLM looks for paths in errors' texts, which may repeat what clients send, and takes "
        "the third power of their length for that: minutes for twenty kilobytes, in which nobody "
        "is answered. Shortens them before.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="vLLM bounds what an error repeats.",
    ),
    Patch(
        name="validation-error-texts",
        target="vllm.entrypoints.serve.exception_handling.handlers.validation:sanitize_message",
        takes=("message",),
        handler="server.requests.http_calls:sanitize_message",
        why="As error-texts, of bodies that are wrong.",
        checked=("0.29", "0.29/2", "0.30", "0.31", "0.31/2", "0.32", "0.32/2", "0.33", "0.33/2"),
        until="As error-texts.",
    ),
)

GATEWAY_SEAMS = Seams(GATEWAY, _PATCHES, attributes=GATEWAY_ATTRIBUTES)
