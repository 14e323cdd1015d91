"""From which token of its prompt a request's adapter is active, if not from the first.

An activated adapter (aLoRA) is active from the last occurrence of its invocation tokens in the
prompt. That position is found once, in the engine core, and kept with the request's adapter: vLLM
sends it to the workers with the request, both model runners keep it there, and vLLM sends it again
if they have dropped the request.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest

_TOKEN = array("q").itemsize


class ActivatedLoRARequest(LoRARequest, array_like=True, omit_defaults=True):
    """A request's adapter that acts on a part of the request's tokens.

    Attributes:
        start: The first token that it acts on, counted from the prompt's first.
    """

    start: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    __hash__ = LoRARequest.__hash__


def from_token(lora: LoRARequest, start: int | None) -> LoRARequest:
    """The adapter of a request, acting from a token on; None: on all of them."""
    known = msgspec.structs.asdict(lora)
    known.pop("start", None)
    if start is not None:
        return ActivatedLoRARequest(**known, start=start)
    return LoRARequest(**known) if isinstance(lora, ActivatedLoRARequest) else lora


def start_of(lora: Any) -> int:
    """The first token that an adapter of a request acts on; 0 for none, and for plain ones."""
    return lora.start if isinstance(lora, ActivatedLoRARequest) else 0


def last_occurrence(tokens: Sequence[int], invocation: Sequence[int]) -> int | None:
    content, requested = array("q", tokens).tobytes(), array("q", invocation).tobytes()
    at = content.rfind(requested)
    while at % _TOKEN and at >= 0:  # across the border of two tokens
        at = content.rfind(requested, 0, at + len(requested) - 1)
    return at // _TOKEN if at >= 0 else None
