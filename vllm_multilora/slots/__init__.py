"""Tokens, slots and host memory: who is served next, who is in them, and who must go.

Pure decisions without torch, vLLM or threads. `SlotAssignment` belongs to the engine core, and
`SlotTurns`, `FairShares` and `StepBound` to the scheduler. `simulation` replays traces against the
same slots and policies.
"""

from vllm_multilora.slots.policies.policy import CachePolicy

__all__ = ["CachePolicy"]
