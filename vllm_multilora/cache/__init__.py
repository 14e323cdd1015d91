"""The adapter cache: states, tiers, budgets, pins and policies.

`AdapterCache` decides which adapters have a host copy (CPU tier) and which have a slot (GPU
tier); whoever owns it moves the weights. It is pure logic, without torch, vLLM or threads, and
`simulation` replays traces against the same classes.
"""

from vllm_multilora.cache.adapter_cache import AdapterCache
from vllm_multilora.cache.budget import CpuBudget
from vllm_multilora.cache.decisions import Activation, Admission
from vllm_multilora.cache.errors import (
    AdapterInUseError,
    CacheError,
    CacheFullError,
    MissingAdaptersError,
    PinLimitError,
    PolicyError,
    SlotsExhaustedError,
    UnknownAdapterError,
)
from vllm_multilora.cache.events import CacheEvents
from vllm_multilora.cache.policy import CachePolicy
from vllm_multilora.cache.registry import make_policy, policy_factory, policy_names
from vllm_multilora.cache.states import AdapterState, IllegalTransitionError, Tier

__all__ = [
    "Activation",
    "AdapterCache",
    "AdapterInUseError",
    "AdapterState",
    "Admission",
    "CacheError",
    "CacheEvents",
    "CacheFullError",
    "CachePolicy",
    "CpuBudget",
    "IllegalTransitionError",
    "MissingAdaptersError",
    "PinLimitError",
    "PolicyError",
    "SlotsExhaustedError",
    "Tier",
    "UnknownAdapterError",
    "make_policy",
    "policy_factory",
    "policy_names",
]
