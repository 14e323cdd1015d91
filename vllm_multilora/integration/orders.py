"""Orders of the engine core to its workers, as values that vLLM's calls carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from vllm_multilora.store.messages import PackInfo


@dataclass(frozen=True)
class Fill:
    """Copy an adapter into a slot, beside the steps.

    Attributes:
        order: Its number; the answer names it.
        slot: The slot; no step uses it before the answer.
        request: The adapter.
        pack: Where its weights lie in host memory.
        elsewhere: Where they lie on the server's other machines, in their order.
    """

    order: int
    slot: int
    request: LoRARequest
    pack: PackInfo
    elsewhere: tuple[PackInfo, ...] = ()


@dataclass(frozen=True)
class Check:
    """Say whether the layers that vLLM fills itself take an adapter; nothing is changed.

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


Order: TypeAlias = Fill | Check
