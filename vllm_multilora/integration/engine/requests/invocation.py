"""Finds where in its prompt a request's adapter becomes active, once its weights are known.

Only the last invocation in the prompt counts. Generated tokens are computed with the adapter,
whatever they are, and a request that was preempted keeps its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_multilora.integration.activated import from_token, last_occurrence
from vllm_multilora.integration.attached import Attached

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_multilora.store.protocol.messages import PackInfo

ACTIVATION: Attached[Activation] = Attached("activation")
"""Where the activated adapter of a `Request` begins to act, and in which version."""


@dataclass(frozen=True)
class Activation:
    """Where a version of an adapter begins to act on a request.

    Attributes:
        digest: Of the version's weights.
        start: The first token; None: the prompt does not invoke it.
    """

    digest: str
    start: int | None


def is_invoked(request: Request, pack: PackInfo) -> bool:
    """Whether a request's prompt invokes a version of its adapter; plain ones need not be."""
    if not pack.invocation_tokens:
        return True
    known = ACTIVATION.get(request)
    if known is None or known.digest != pack.digest:
        known = Activation(pack.digest, _find(request, pack.invocation_tokens))
        ACTIVATION.set(request, known)
    return known.start is not None


def _find(request: Request, invocation: tuple[int, ...]) -> int | None:
    # Of embeddings in tokens' places nobody can say what they invoke.
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return None
    return last_occurrence(request.prompt_token_ids, invocation)


def start_in(request: Request, digest: str) -> int | None:
    """The first token that a version of a request's adapter acts on; None for plain ones."""
    known = ACTIVATION.get(request)
    return known.start if known is not None and known.digest == digest else None


def activate(request: Request, digest: str) -> None:
    """Has a request's adapter act from its invocation on, in the version that it is to run on."""
    if request.lora_request is not None:
        request.lora_request = from_token(request.lora_request, start_in(request, digest))
