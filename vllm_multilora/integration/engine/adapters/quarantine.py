"""Takes adapters out of service that produced non-finite numbers.

A checkpoint may pass every check and still overflow with some prompt. Non-finite numbers reach the
logits of the step that makes them, where vLLM counts them, behind captured graphs and in both model
runners (`kv_blocks.start` turns that on; `worker.sampling` makes it count by request if tokens are
drafted). What pooling models answer is examined here. The adapter's requests are ended, and new
ones are refused until the adapter has other weights or was registered again. What its requests
leave in the KV cache is never read, see `kv_blocks`.

An adapter is not blamed for what the base model does: once that has made non-finite numbers for a
request without an adapter, no adapter is quarantined until the base model has other weights, and
the log says so. Requests with input that a client has computed (prompt embeddings, images) are not
examined either.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from vllm_multilora.adapters.blend import is_blend
from vllm_multilora.failures import FailureKind, LoadFailure
from vllm_multilora.integration.engine.requests.late_reloads import has_begun
from vllm_multilora.integration.engine.requests.prefix_keys import VERSION

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

    from vllm_multilora.store.protocol.messages import PackInfo

logger = logging.getLogger(__name__)

RELOADS = ("reload_weights", "update_weights", "finish_weight_update")
"""Methods of vLLM's workers that give the base model other weights."""

_MAX_REMEMBERED = 4096


class Quarantine:
    """Which weights must not be used; for the engine core's main thread.

    They are told apart by their digest: under another name they are the same.
    """

    def __init__(self) -> None:
        self._digests: dict[str, None] = {}
        # Apart: whoever thinks of weights that overflow must not have others forgotten.
        self._blends: dict[str, None] = {}
        self._is_base_unsound = False
        # Requests that had begun when the base model got other weights.
        self._begun_before: set[str] = set()

    def failure(self, pack: PackInfo | None) -> LoadFailure | None:
        """Why a version of an adapter, or a part of it, must not be used; None if it may."""
        if pack is None or not (self._digests or self._blends):
            return None
        is_known = pack.digest in self._digests or pack.digest in self._blends
        return _FAILURE if is_known or not self._digests.keys().isdisjoint(pack.parts) else None

    def lift(self, pack: PackInfo | None) -> None:
        """These weights may be tried again: somebody has registered them anew."""
        if pack is not None:
            self._digests.pop(pack.digest, None)
            self._blends.pop(pack.digest, None)

    def base_reloaded(self, requests: Mapping[str, Request]) -> None:
        """The base model has other weights: what it makes is looked at anew.

        But for requests that have begun: steps of theirs that are under way, and what they have in
        the KV cache, are of the weights before.
        """
        self._is_base_unsound = False
        self._begun_before.update(name for name, each in requests.items() if has_begun(each))

    def look(
        self, output: Any, requests: dict[str, Request], pack_of: Callable[[int], PackInfo | None]
    ) -> dict[int, LoadFailure]:
        """Looks for numbers that are not finite in what a step has computed."""
        guilty: dict[int, tuple[LoRARequest, str | None]] = {}
        self._begun_before &= requests.keys()
        for name in _unsound(output):
            request = None if name in self._begun_before else requests.get(name)
            # A client that sends numbers of its own in a prompt's place, which may be anything,
            # could put anybody's adapter out of service, or have nobody's put out any more.
            if request is None or request.prompt_embeds is not None or request.mm_features:
                continue
            lora = request.lora_request
            if lora is not None:
                guilty[lora.lora_int_id] = lora, VERSION.get(request)
            elif not self._is_base_unsound:
                self._is_base_unsound = True
                logger.warning(
                    "The base model itself makes numbers that are not finite: they are no reason "
                    "to quarantine adapters until it has other weights."
                )
        if self._is_base_unsound:
            return {}
        for adapter_id, (lora, digest) in guilty.items():
            # What ran need not be the newest version, which may wait for these requests to end.
            pack = pack_of(adapter_id)
            if pack is not None and pack.digest == digest and self.failure(pack) is not None:
                continue  # or a part of it is quarantined, and whoever lifts that means the blend
            digests = self._blends if is_blend(lora.lora_path) else self._digests
            if digest is not None and digest not in digests:
                logger.warning(
                    "Adapter %r is quarantined: its numbers are not finite in use.", lora.lora_name
                )
                digests[digest] = None
                if len(digests) > _MAX_REMEMBERED:
                    del digests[next(iter(digests))]
        return dict.fromkeys(guilty, _FAILURE)


_FAILURE = LoadFailure(
    FailureKind.QUARANTINED,
    "quarantined: with a request it made numbers that are not finite (NaN), as weights do that "
    "overflow; load a version with sound weights",
)


def _unsound(output: Any) -> Iterable[str]:
    """The requests of a step for which something is not finite."""
    counts = output.num_nans_in_logits or {}
    yield from (request_id for request_id, count in counts.items() if count)
    pooled = output.pooler_output
    for request_id, result in zip(output.req_ids, pooled, strict=False) if pooled else ():
        if isinstance(result, torch.Tensor) and not torch.isfinite(result).all():
            yield request_id
