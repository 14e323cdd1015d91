"""Keys of cached prefixes: of an adapter, they contain the digest of its weights and no more.

vLLM hashes a request's blocks with the adapter's name and path. Here, the adapter's part of such a
key is the digest of its weights. So the same weights have the same keys under every name, on every
server and after every restart, and other weights have other keys. KV connectors and offloading that
use vLLM's block hashes inherit this.

Hashes are computed when a request arrives, if its adapter's weights are known by then; otherwise
when the request has its turn, since a request that waits for its adapter has none before that.
Before the request runs, its keys are compared with the weights in the slot, and computed again if
those have changed.

Blocks that end before an activated adapter becomes active are the base model's: they are keyed like
those of requests without an adapter, and shared with them and with those of all other activated
adapters. The key of the block in which the adapter becomes active contains the position as well as
the digest, because the same tokens may invoke it at different positions, depending on what follows.
All later blocks inherit that.

The base model is not part of vLLM's keys; servers that share a KV store must serve the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_multilora.integration.activated import start_of
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine import invocation

if TYPE_CHECKING:
    from vllm.v1.request import Request

HASHER: Attached[Callable[[Any], list[Any]] | None] = Attached("hasher")
"""What hashes the blocks of a `Request` with an adapter; None where nothing is cached."""

VERSION: Attached[str] = Attached("version")
"""The digest of the weights that a `Request` runs on; not set before they are known."""


def withhold(request: Request, hasher: Callable[[Any], list[Any]] | None) -> None:
    """Keeps the hasher of a request that was made without one, until it gets its keys."""
    HASHER.set(request, hasher)


def set_version(request: Request, digest: str) -> bool:
    """Gives a request the keys of the weights that it is to run on.

    Args:
        request: One with an adapter, which its prompt invokes (`invocation.is_invoked`).
        digest: Of the adapter's weights.

    Returns:
        Whether it may run on them: not where other weights have computed a part of its prompt, or
        of its answer.
    """
    known = VERSION.get(request)
    if known == digest:
        return True
    if known is not None and _holds_results(request, digest):
        return False
    VERSION.set(request, digest)
    invocation.activate(request, digest)
    _hash_again(request)
    return True


def use_stock_keys(request: Request) -> None:
    """Gives a request vLLM's own keys: its adapter is loaded by vLLM itself."""
    if HASHER.is_set(request):
        _hash_again(request)


def _holds_results(request: Request, digest: str) -> bool:
    """Whether other weights than those of a digest have left something, here or in a worker."""
    if request.num_computed_tokens or request.num_output_tokens:
        return True
    if request.status is not RequestStatus.PREEMPTED:
        return False
    # Workers that have run it may remember where its adapter begins to act.
    return start_of(request.lora_request) != (invocation.start_in(request, digest) or 0)


def _hash_again(request: Request) -> None:
    request.block_hashes.clear()
    request._block_hasher = HASHER.get(request)
    request.update_block_hashes()


def lora_hash_keys(original: Callable[..., list[Any]], request: Any) -> list[Any]:
    digest = VERSION.get(request)
    if digest is None:
        return original(request)
    # Where it begins tells requests apart whose blocks nobody looks at singly.
    start = start_of(request.lora_request)
    return [("lora", digest, start)] if start else [("lora", digest)]


def block_hash_keys(
    original: Callable[..., tuple[tuple[Any, ...] | None, int]],
    request: Any,
    start_token_idx: int,
    end_token_idx: int,
    start_mm_idx: int,
) -> tuple[tuple[Any, ...] | None, int]:
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    acts_from = start_of(request.lora_request)
    if not acts_from or not keys:
        return keys, next_mm_idx
    (kind, digest, _), *others = keys  # the adapter's is the first
    if start_token_idx >= acts_from:
        return ((kind, digest), *others), next_mm_idx
    if end_token_idx > acts_from:
        return ((kind, digest, acts_from - start_token_idx), *others), next_mm_idx
    return tuple(others) or None, next_mm_idx
