"""Ends requests of tenants whose grammars keep everybody waiting.

Which tokens the grammar of a structured output allows next is computed between two steps. Sound
ones take a millisecond at most; one of a line may take seconds, and for each token more than for
the last, while no step is taken for anybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from vllm_multilora.integration.attached import GRAMMAR_TIME, SLOW_GRAMMARS
from vllm_multilora.integration.failures import slow_grammar_stop_reason
from vllm_multilora.integration.tenant_of_request import tenant_of

ALLOWED_S = 0.5
"""Of processor time, that a grammar may take for one token after it has taken little."""

ALLOWED_PER_TOKEN_S = 0.02
"""That it may take for each."""


def fill_bitmasks(original: Callable[..., None], manager: Any, batch: Iterable[Any]) -> None:
    """Finds out what grammars allow, and how long each takes; on several threads, if many."""
    for one in batch:
        begun = time.thread_time()
        original(manager, (one,))
        _note(manager, one[0], time.thread_time() - begun)


def _note(manager: Any, grammar: Any, seconds: float) -> None:
    before = GRAMMAR_TIME.get(grammar)
    left = (ALLOWED_S if before is None else before) + ALLOWED_PER_TOKEN_S - seconds
    GRAMMAR_TIME.set(grammar, min(left, ALLOWED_S))
    if left < 0:
        slow = SLOW_GRAMMARS.get(manager)
        if slow is None:
            SLOW_GRAMMARS.set(manager, slow := [])
        slow.append(grammar)


def take_slow(scheduler: Any) -> dict[str, str]:
    """Running requests of tenants whose grammars have taken too long since the last call.

    Returns:
        Their stop reasons.
    """
    manager = getattr(scheduler, "structured_output_manager", None)
    if not (slow := SLOW_GRAMMARS.get(manager)):
        return {}
    SLOW_GRAMMARS.set(manager, [])
    numbers = set(map(id, slow))
    return {
        request.request_id: slow_grammar_stop_reason()
        for request in scheduler.running
        if tenant_of(request) is not None
        and (output := request.structured_output_request) is not None
        and id(output.grammar) in numbers
    }
