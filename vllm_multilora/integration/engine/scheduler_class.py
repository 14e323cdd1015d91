"""Builds the scheduler class for vLLM: the one that it chose, extended with ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from vllm_multilora.integration.engine.fair_scheduler import FairSharesMixin
from vllm_multilora.integration.engine.scheduler import AdapterAwareMixin
from vllm_multilora.integration.patching.activation import loads_adapters, settings_of

logger = logging.getLogger(__name__)


@lru_cache
def adapter_aware(scheduler: type) -> type:
    """A scheduler class that makes an `AdapterAwareMixin` of itself where the plugin is active.

    Where shares are fair it makes a `FairSharesMixin`. Where the plugin is not active, an instance
    is exactly of the class given.
    """

    class AdapterAwareScheduler(AdapterAwareMixin, scheduler):
        def __new__(cls, *args: Any, vllm_config: Any, **kwargs: Any) -> Any:
            if not loads_adapters(vllm_config):
                return scheduler(*args, vllm_config=vllm_config, **kwargs)
            return super().__new__(FairScheduler if _shares_fairly(scheduler, vllm_config) else cls)

    class FairScheduler(FairSharesMixin, AdapterAwareScheduler):
        """An `AdapterAwareScheduler` too, so that Python initialises what `__new__` returns."""

    for made, prefix in ((AdapterAwareScheduler, "AdapterAware"), (FairScheduler, "Fair")):
        made.__name__ = made.__qualname__ = f"{prefix}{scheduler.__name__}"
    return AdapterAwareScheduler


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


def get_scheduler_cls(original: Callable[..., type], self: Any) -> type:
    return adapter_aware(original(self))
