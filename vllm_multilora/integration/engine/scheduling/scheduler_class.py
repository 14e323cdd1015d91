"""Derives an engine's scheduler class from the one that vLLM chose."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from vllm_multilora.integration.engine.requests.tenant_wall import TenantWallMixin, has_wall
from vllm_multilora.integration.engine.scheduling.fair_scheduler import FairSharesMixin
from vllm_multilora.integration.engine.scheduling.scheduler import AdapterAwareMixin
from vllm_multilora.integration.patching.activation import loads_adapters, settings_of

logger = logging.getLogger(__name__)


def scheduler_over(scheduler: type, vllm_config: Any) -> type:
    """The scheduler class of an engine, over the one that vLLM chose.

    Where the plugin loads the adapters it is an `AdapterAwareMixin`, and a `FairSharesMixin` where
    shares are fair. Where there are tenants, a `TenantWallMixin` stands in front.
    """
    made = scheduler
    if loads_adapters(vllm_config):
        made = _derived("AdapterAware", AdapterAwareMixin, scheduler)
        if _shares_fairly(scheduler, vllm_config):
            made = _derived("Fair", FairSharesMixin, made)
    return _derived("Walled", TenantWallMixin, made) if has_wall(vllm_config) else made


@lru_cache
def _derived(prefix: str, mixin: type, base: type) -> type:
    return type(base)(f"{prefix}{base.__name__}", (mixin, base), {})


def _shares_fairly(scheduler: type, vllm_config: Any) -> bool:
    if not settings_of(vllm_config).fair_shares:
        return False
    policy = vllm_config.scheduler_config.policy
    if policy != "fcfs":
        logger.info(
            "Fair shares are off: requests are served by vLLM's --scheduling-policy %s.", policy
        )
        return False
    if not hasattr(scheduler, "_reserve_prefill_lookahead"):
        logger.warning(
            "Fair shares are off: %s does not ask how much of a prompt to compute in a step, as "
            "those of the supported vLLM versions do.",
            scheduler.__name__,
        )
        return False
    return True
