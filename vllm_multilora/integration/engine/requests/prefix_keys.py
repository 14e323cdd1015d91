"""Keys of cached prefixes: of an adapter, they contain the digest of its weights and no more.

vLLM hashes a request's blocks with the adapter's name and path. Here, the adapter's part of such a
key is the digest of its weights. So the same weights have the same keys under every name, on every
server and after every restart, and other weights have other keys. KV connectors and offloading that
use vLLM's block hashes inherit this.

Hashes are computed when a request arrives, with the weights of its adapter that are known by then.
Before the request runs, its keys are compared with the weights in the slot, and computed again if
those are others, or were not known.

Blocks that end before an activated adapter becomes active are the base model's: they are keyed like
those of requests without an adapter, and shared with them and with those of all other activated
adapters. The key of the block in which the adapter becomes active contains the position as well as
the digest, because the same tokens may invoke it at different positions, depending on what follows.
All later blocks inherit that.

A request that goes on with other weights (a swap in flight) has keys of its own from the first
block on that they have computed a part of.

The base model is not part of vLLM's keys; servers that share a KV store must serve the same one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from vllm_multilora.integration.activated import start_of
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine.requests import invocation

if TYPE_CHECKING:
    from vllm.v1.request import Request

VERSION: Attached[str | None] = Attached("version")
"""The digest of the weights that a `Request` runs on; not set before they are known.

None where vLLM loads the adapter, and has keys of its own.
"""

MIXED: Attached[tuple[int, str | None, str] | None] = Attached("mixed")
"""Where a `Request` goes on with other weights: their first token, the digest of those before,
and what stands in later keys in the place of a digest."""

_newest: weakref.ref[Any] | None = None
"""The scheduler that was made last. Its `prepare_keys` learns, on any thread, what the keys of a
request contain that arrives. A process that runs several engines computes some keys again."""


def prepare_by(scheduler: Any) -> None:
    """Has requests that arrive from now on prepared by a scheduler."""
    global _newest
    _newest = weakref.ref(scheduler)


def learn_version(request: Request, adapters: Any) -> None:
    """Learns a request's weights from `EngineAdapters`, if they are known; on any thread."""
    if request.lora_request is None or request.block_hashes or VERSION.is_set(request):
        return
    version = None if adapters is None else adapters.version(request.lora_request.lora_int_id)
    if version is not None and invocation.is_invoked(request, version):
        VERSION.set(request, version.digest)
        invocation.activate(request, version.digest)


def set_version(request: Request, digest: str, *, goes_on: bool = False) -> bool:
    """Gives a waiting request the keys of the weights that it is to run on.

    Returns:
        Whether it may run on them: not where other weights have computed a part of its prompt, or
        of its answer, unless it `goes_on` with these.
    """
    known = VERSION.get(request)
    is_new = not request.num_computed_tokens and MIXED.get(request) is not None
    if known == digest and not is_new:
        return True
    if known not in (None, digest) and not goes_on and _holds_results(request, digest):
        return False
    MIXED.set(request, None)
    VERSION.set(request, digest)
    invocation.activate(request, digest)
    request.block_hashes.clear()
    request.update_block_hashes()
    return True


def go_on(request: Request, digest: str) -> None:
    """Gives the blocks that other weights of a request's adapter compute keys of their own.

    They are those of all tokens that no step has been scheduled for. No other request has such a
    key: what two versions have computed is never found again.
    """
    if MIXED.get(request) is not None:
        return
    first, hashes = min(request.num_computed_tokens, request.num_tokens - 1), request.block_hashes
    MIXED.set(request, (first, VERSION.get(request), f"{digest} {request.request_id}"))
    if hashes:
        # Blocks may be shorter than that: some are then hashed again that need not be.
        longest = request.num_tokens // len(hashes)
        del hashes[first // longest :]
    request.update_block_hashes()


def use_stock_keys(request: Request) -> None:
    """Gives a request vLLM's own keys: its adapter is loaded by vLLM itself."""
    VERSION.set(request, None)
    request.block_hashes.clear()
    request.update_block_hashes()


def _holds_results(request: Request, digest: str) -> bool:
    """Whether other weights than those of a digest have left something, here or in a worker."""
    if request.num_computed_tokens or request.num_output_tokens:
        return True
    if request.status is not RequestStatus.PREEMPTED:
        return False
    # Workers that have run it may remember where its adapter begins to act.
    return start_of(request.lora_request) != (invocation.start_in(request, digest) or 0)


def block_hash_keys(
    original: Callable[..., tuple[tuple[Any, ...] | None, int]],
    request: Any,
    start_token_idx: int,
    end_token_idx: int,
    start_mm_idx: int,
) -> tuple[tuple[Any, ...] | None, int]:
    newest = None if start_token_idx or _newest is None else _newest()
    if newest is not None:
        newest.prepare_keys(request)
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    digest = VERSION.get(request)
    if (mixed := MIXED.get(request)) is not None:
        first, before, mark = mixed
        digest = before if end_token_idx <= first else mark
    if digest is None or keys is None:
        return keys, next_mm_idx
    _, *others = keys  # the adapter's is the first
    acts_from = start_of(request.lora_request)
    if end_token_idx <= acts_from:
        return tuple(others) or None, next_mm_idx
    begins_at = (acts_from - start_token_idx,) if start_token_idx < acts_from else ()
    return (("lora", digest, *begins_at), *others), next_mm_idx
