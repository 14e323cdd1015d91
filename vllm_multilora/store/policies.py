"""Where the store gets its cache policy from."""

from __future__ import annotations

from vllm_multilora.slots.contained_policy import ContainedPolicy
from vllm_multilora.slots.cost import reload_cost
from vllm_multilora.slots.errors import PolicyError
from vllm_multilora.slots.policy import CachePolicy
from vllm_multilora.slots.registry import make_policy

__all__ = ["CachePolicy", "ContainedPolicy", "PolicyError", "make_policy", "reload_cost"]
