"""Orders of the engine core to its workers, as values that vLLM's calls carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.store.protocol.messages import PackInfo


@dataclass(frozen=True)
class Order:
    """What workers are to do with an adapter in host memory, beside the steps.

    Attributes:
        order: Its number; the answer names it.
        request: The adapter.
        pack: Where its weights lie in host memory.
        elsewhere: Where they lie on the server's other machines, in their order.
    """

    order: int
    request: LoRARequest
    pack: PackInfo
    elsewhere: tuple[PackInfo, ...] = ()


@dataclass(frozen=True)
class Check(Order):
    """Say whether the layers that vLLM fills itself take an adapter; nothing is changed."""


@dataclass(frozen=True, kw_only=True)
class Fill(Order):
    """Copy an adapter into a slot.

    Attributes:
        slot: The slot; no step uses it before the answer.
        is_beside: Whether steps go on using the slot that the adapter has, until a `Swap`.
    """

    slot: int
    is_beside: bool = False


@dataclass(frozen=True, kw_only=True)
class Swap(Order):
    """From the next step on, use the slot that a `Fill` beside the adapter's own has filled."""

    slot: int
