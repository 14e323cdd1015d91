"""Blends in an API server: from names and weights to what the engine is asked for.

A client names the base model and, in the field `lora_blend`, adapters with a weight each; a routes
file does so under a name of its own. What that stands for is decided for each request: the blend of
the versions that the names have then. Nothing of it is kept here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.blends import blended
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import registration
from vllm_multilora.integration.server.names.public_names import public_names

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


def why_none(models: Any) -> str | None:
    """Why a server blends nothing; None if it does."""
    if not registration.acts_for(models):
        return "vLLM's own kernels (--multilora-backend vllm) blend nothing"
    if not settings_of(models.engine_client.vllm_config).max_blends:
        return "blends are switched off here (--multilora-max-blends 0)"
    if getattr(getattr(models, "model_config", None), "runner_type", None) == "pooling":
        return "blends are served by models that generate, not by this one"
    return None


def blend_now(models: Any, weights: Iterable[tuple[str, float]]) -> LoRARequest | None:
    """The blend of the versions that names stand for now; None if one stands for none any more."""
    found = [(public_names(models).get(name), weight) for name, weight in weights]
    parts = [(lora, weight) for lora, weight in found if lora is not None]
    return blended(parts) if len(parts) == len(found) else None
