"""Keeps the grammars of one tenant's structured outputs from keeping everybody waiting.

They are compiled on a few threads, which may take a minute for one. Tenants take turns there, and
for requests that have ended nothing is compiled.

Which tokens the grammar of a structured output allows next is computed between two steps, and what
follows from the token that was chosen, too. Sound ones take a millisecond at most; one of a line
may take seconds for either, and for each token more than for the last, while no step is taken for
anybody. Requests of tenants end whose grammars do so.

A grammar may also allow no token at all: none of the vocabulary has the characters that have to
follow, or there is none that ends an answer. Anybody's requests end then, without the token that
vLLM has chosen all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.failures import (
    slow_grammar_stop_reason,
    stuck_grammar_stop_reason,
)
from vllm_multilora.integration.tenant_of_request import tenant_of
from vllm_multilora.tenants.work_turns import take_turns

if TYPE_CHECKING:
    from vllm.v1.request import Request

GRAMMAR_TIME: Attached[float] = Attached("grammar-time")
"""The seconds that a grammar of vLLM's may take for its next token."""

SLOW_GRAMMARS: Attached[list[Any]] = Attached("slow-grammars")
"""Grammars of a `StructuredOutputManager` that have taken too long and were not looked at yet; not
set where nobody looks."""

STUCK_GRAMMARS: Attached[list[Any]] = Attached("stuck-grammars")
"""Grammars of a `StructuredOutputManager` that have allowed no token, and whose requests have got
none since."""

ALLOWED_S = 0.5
"""Of processor time, that a grammar may take for one token after it has taken little."""

ALLOWED_PER_TOKEN_S = 0.02
"""That it may take for each."""


def keep_apart(manager: Any) -> None:
    """Has tenants take turns for grammars, and notes bad ones, for whoever asks `take_bad`.

    Args:
        manager: vLLM's `StructuredOutputManager`.
    """
    executor = getattr(manager, "executor", None)  # it has none without a tokenizer
    if isinstance(executor, Executor):
        take_turns(executor, _owner_of, lambda request: not request.is_finished())
        SLOW_GRAMMARS.set(manager, [])
        STUCK_GRAMMARS.set(manager, [])


def _owner_of(request: Request) -> str:
    tenant = tenant_of(request)
    return "" if tenant is None else tenant.name


def fill_bitmasks(original: Callable[..., None], manager: Any, batch: Iterable[Any]) -> None:
    """Finds out what grammars allow, if anything, and how long each takes; on threads, if many."""
    slow, stuck = SLOW_GRAMMARS.get(manager), STUCK_GRAMMARS.get(manager)
    if slow is None or stuck is None:
        original(manager, batch)
        return
    for one in batch:
        begun = time.thread_time()
        original(manager, (one,))
        if _is_slow(one[0], time.thread_time() - begun):
            slow.append(one[0])
        if not manager._grammar_bitmask[one[1]].any():
            stuck.append(one[0])


def accept_tokens(
    original: Callable[..., bool], manager: Any, request: Request, *args: Any, **kwargs: Any
) -> bool:
    """Has a grammar go on by the tokens that were chosen, and finds out how long that takes."""
    output, slow = request.structured_output_request, SLOW_GRAMMARS.get(manager)
    if output is None or slow is None:
        return original(manager, request, *args, **kwargs)
    begun = time.thread_time()
    are_allowed = original(manager, request, *args, **kwargs)
    if _is_slow(output.grammar, time.thread_time() - begun, allowed_s=0.0):
        slow.append(output.grammar)
    return are_allowed


def _is_slow(grammar: Any, seconds: float, allowed_s: float = ALLOWED_PER_TOKEN_S) -> bool:
    before = GRAMMAR_TIME.get(grammar)
    left = (ALLOWED_S if before is None else before) + allowed_s - seconds
    GRAMMAR_TIME.set(grammar, min(left, ALLOWED_S))
    return left < 0


def take_bad(scheduler: Any, output: Any) -> dict[str, str]:
    """Requests that cannot go on for their grammars' sake, also those that were preempted since.

    They are tenants', and their grammars have taken too long since the last call; or anybody's, and
    one of their tokens in a step's output was chosen where their grammars allow none.

    Args:
        scheduler: vLLM's, which has not seen the output yet.
        output: vLLM's `ModelRunnerOutput`.

    Returns:
        Their stop reasons.
    """
    manager = scheduler.structured_output_manager
    slow, stuck = SLOW_GRAMMARS.get(manager), STUCK_GRAMMARS.get(manager)
    if slow is None or stuck is None or not (slow or stuck):
        return {}
    slow_ones, stuck_ones = set(map(id, slow)), set(map(id, stuck))
    slow.clear()
    stuck.clear()
    ending = {}
    for request in scheduler.requests.values():
        if (wanted := request.structured_output_request) is None:
            continue
        if id(wanted.grammar) in slow_ones and tenant_of(request) is not None:
            ending[request.request_id] = slow_grammar_stop_reason()
        elif id(wanted.grammar) in stuck_ones:
            if not (tokens := _tokens_of(request, output)):
                stuck.append(wanted.grammar)  # the output is of a step before
            # It may have been stuck after a draft only, and the model has chosen something else.
            elif len(manager.validate_tokens(request, tokens)) < len(tokens):
                ending[request.request_id] = stuck_grammar_stop_reason()
    return ending


def _tokens_of(request: Request, output: Any) -> list[int]:
    index, tokens = output.req_id_to_index.get(request.request_id), output.sampled_token_ids
    return tokens[index] if index is not None and tokens else []
