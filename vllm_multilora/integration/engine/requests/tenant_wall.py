"""On a server with tenants, the engine answers no request that did not pass the gateway.

The gateway seals every call that it lets through. A request by any other way (gRPC, a WebSocket, a
route that is new in vLLM) has no seal: it ends with an error, and is never part of a step.
"""

from __future__ import annotations

import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.engine.requests import prefix_keys
from vllm_multilora.integration.failed_requests import unsealed_stop_reason
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.seals import SECRET_VARIABLE, Seal, opened

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

SEAL: Attached[Seal] = Attached("seal")
"""The seal that an engine core's `Request` came with, where there are tenants."""

_SEAL_IN_ID = re.compile(r"~([^~]{1,128})~")
_WARN_S = 60.0


def has_wall(vllm_config: VllmConfig) -> bool:
    """Whether an engine serves tenants: it has their settings, and the secret of their server."""
    return settings_of(vllm_config).tenants is not None and SECRET_VARIABLE in os.environ


def tenant_of(request: Request) -> Seal | None:
    """The seal of a request in an engine core; None where it is no tenant's."""
    seal = SEAL.get(request)
    return seal if seal is not None and seal.tenant else None


class TenantWallMixin:
    """A scheduler, over any other one, that takes sealed requests only."""

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any) -> None:
        super().__init__(*args, vllm_config=vllm_config, **kwargs)  # type: ignore[call-arg]
        self._secret = os.environ[SECRET_VARIABLE]
        self._refused: list[Request] = []
        self._warn_at = 0.0
        prefix_keys.prepare_by(self)

    def prepare_keys(self, request: Request) -> None:
        """Opens the seal of a request, whose salt is part of the keys of its blocks; any thread."""
        self.open_seal(request)
        if hasattr(super(), "prepare_keys"):
            super().prepare_keys(request)  # type: ignore[misc]

    def open_seal(self, request: Request) -> None:
        """Reads a request's seal as it arrives, before its blocks are hashed; any thread."""
        if SEAL.is_set(request):
            return
        in_id = _SEAL_IN_ID.search(request.request_id)
        for text in (request.cache_salt, in_id and in_id[1]):
            if (seal := opened(self._secret, text)) is not None:
                SEAL.set(request, seal)
                request.cache_salt = seal.salt or None
                if seal.tenant:
                    request.priority = max(request.priority, 0)  # the lowest comes first
                return

    def add_request(self, request: Request) -> None:
        """Takes a request in; one without a seal ends with the next step."""
        self.open_seal(request)  # where prefixes are not cached, nothing hashes its blocks
        if SEAL.is_set(request):
            super().add_request(request)  # type: ignore[misc]
            return
        self._refused.append(request)
        if time.monotonic() >= self._warn_at:
            self._warn_at = time.monotonic() + _WARN_S
            logger.warning(
                "A request that did not come through the gateway was refused: with tenants, the "
                "engine answers no others."
            )

    def has_requests(self) -> bool:
        """Whether a step has anything to do, be it to end what was refused."""
        return bool(self._refused) or super().has_requests()  # type: ignore[misc]

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        """Takes in a step's results, and answers what was refused since the last."""
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        refused, self._refused = self._refused, []
        for request in refused:
            sent = outputs.setdefault(request.client_index, EngineCoreOutputs())
            sent.outputs.append(_refusal(request))
        return outputs


def _refusal(request: Request) -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        # vLLM takes a pooling request without a result for one that generates.
        pooling_output=None if request.pooling_params is None else torch.empty(0),
        finish_reason=FinishReason.ERROR,
        stop_reason=unsealed_stop_reason(),
    )
