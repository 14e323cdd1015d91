"""The last check of a request in the API server before it goes to the engine.

All endpoints pass through here, including those that are new in vLLM: what a tenant was not granted
is refused, whatever let it through before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from typing import Any

from vllm import envs
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError

from vllm_multilora.adapters.blends import folders_of
from vllm_multilora.integration.attached import HIDDEN_FOLDERS, METER, SEE_OFF
from vllm_multilora.integration.server import metering
from vllm_multilora.integration.server.callers import MOST_SCORES, Caller, current_caller
from vllm_multilora.integration.tenant_of_request import set_tenant
from vllm_multilora.tenants.limits import Account, Meter
from vllm_multilora.tenants.on_request import RequestTenant
from vllm_multilora.tenants.salts import tenant_salt

MOST_ID = 1_024
"""Characters of the id of a tenant's request: each of its tokens comes with it."""

MOST_STOPS = 64
"""Texts that end an answer to it, and tokens that do: all are looked for after each token. Most
endpoints take four texts."""

MOST_TOKENS = 1_024
"""Tokens that it may allow, or favour. With more, vLLM's second model runner ends its engine."""

MOST_COMPARISONS = 32_768
"""Of tokens, after each token, that its `repetition_detection` may take."""

MOST_LENGTH = 1 << 30
"""Of its answer, in tokens. Engines end at what their 32 bits do not hold."""

MOST_SEED = (1 << 63) - 1

_postponed: ContextVar[Callable[[Any], None] | None] = ContextVar("multilora_check", default=None)
"""Checks the structured output of the request that is about to be sent."""

_checked: ContextVar[Any] = ContextVar("multilora_checked", default=None)
"""The structured output that was checked last; the children of a request have one in common."""


def add_request(
    original: Callable[..., None],
    processor: Any,
    request: Any,
    prompt: Any,
    parent: Any = None,
    index: int = 0,
    *args: Any,
    **kwargs: Any,
) -> None:
    caller = current_caller.get()
    is_new = request.request_id not in processor.request_states
    if caller is not None:
        mark(request, caller)
        caller.count_scores(_scores_of(request))
        if is_new and index == 0 and not metering.is_of_beam_search():
            answers = 1 if parent is None else parent.sampling_params.n
            caller.count_answers(answers)
            caller.count_bytes((request.prompt_token_ids, request.sampling_params), answers)
    if is_new and request.lora_request is not None and (see_off := SEE_OFF.get(processor)):
        see_off(request.lora_request)
    original(processor, request, prompt, parent, index, *args, **kwargs)
    state = processor.request_states.get(request.request_id)
    if state is not None and is_new:
        metering.begin(processor, state)
    if caller is None or state is None:
        return
    if caller.hides_folders:
        adapter = request.lora_request
        own = () if adapter is None else folders_of(adapter.lora_path)
        HIDDEN_FOLDERS.set(state, (*caller.folders, *own))
    if caller.account is not None:
        # The children of a request with several answers share their prompt.
        caller.account.charge(state.prompt_len if index == 0 else 0)
        caller.account.watch(meter(processor, state))


def _scores_of(request: Any) -> int:
    """How many log probabilities of its prompt's tokens a request wants."""
    params = request.sampling_params
    if params is None:  # of a pooling request
        return 0
    if (most := params.prompt_logprobs) is not None:
        # -1 is one for each token that there is.
        return len(request.prompt_token_ids or ()) * (most + 1) if most >= 0 else MOST_SCORES + 1
    ids = getattr(params, "prompt_logprob_token_ids", None)
    return 0 if ids is None else int(ids.size)


async def send_request(
    original: Callable[..., Any], client: Any, request: Any, *args: Any, **kwargs: Any
) -> None:
    """Hands a request to the output processor, and then to the engine.

    Where it cannot be sent nobody hears of it again: its client has gone, or it holds a number of
    more than 64 bits or a text that is no Unicode.
    """
    await _check_postponed(request.sampling_params)
    processor = client.output_processor
    is_new = request.request_id not in processor.request_states
    try:
        await original(client, request, *args, **kwargs)
    except BaseException:
        if is_new and METER.get(processor) is not None:
            await client.abort(request.request_id, internal=True)
        raise


def check_structured_outputs(original: Callable[..., None], params: Any, *given: Any) -> None:
    """Checks whether a structured output can be had; a tenant's when its request is to be sent.

    vLLM does so on the event loop: a schema of a line, with long repetitions in a pattern, takes
    seconds, and nobody is answered meanwhile.
    """
    caller = current_caller.get()
    if caller is None or caller.account is None or params.structured_outputs is None:
        original(params, *given)
        return

    def check(params: Any) -> None:
        original(params, *given)

    _postponed.set(check)


async def _check_postponed(params: Any) -> None:
    caller, check = current_caller.get(), _postponed.get()
    wanted = getattr(params, "structured_outputs", None)
    if caller is None or caller.account is None or check is None or wanted is None:
        return
    if _checked.get() is not wanted:
        await _in_turn(caller.account, partial(check, params))
        _checked.set(wanted)


async def _in_turn(account: Account, work: Callable[[], None]) -> None:
    """Works on a thread, for a tenant at one thing at a time, whether its client goes or not."""
    await account.checking.acquire()

    def end(task: asyncio.Future[None]) -> None:
        account.checking.release()
        if not task.cancelled():
            task.exception()  # whoever would hear of it may have gone

    working = asyncio.ensure_future(asyncio.to_thread(work))
    working.add_done_callback(end)
    await asyncio.shield(working)


def mark(request: Any, caller: Caller) -> None:
    """Says whose a request is, and keeps its cached prefixes among its tenant's.

    Raises:
        VLLMNotFoundError: Nobody has granted the request what would answer it.
        GracefulHTTPError: Its id is too long, or of a parameter there is too much.
    """
    tenant = caller.tenant
    if tenant is None:
        return
    if len(request.request_id) > MOST_ID:
        raise GracefulHTTPError(
            f"The request's id has more than {MOST_ID} characters.", HTTPStatus.BAD_REQUEST
        )
    for what, found, most in _bounded(request.sampling_params):
        if found > most:
            message = f"{what}: found {found}, expected {most} at most."
            raise GracefulHTTPError(message, HTTPStatus.BAD_REQUEST)
    adapter = request.lora_request
    name = None if adapter is None else adapter.lora_name
    if name not in caller.granted:
        raise VLLMNotFoundError("The model does not exist.")
    set_tenant(request, RequestTenant(tenant.name, tenant.weight, tenant.limits.resident))
    request.priority = max(request.priority, 0)  # the lowest comes first; nobody pushes in
    request.cache_salt = tenant_salt(caller.secret, tenant.name, request.cache_salt)


def _bounded(params: Any) -> Iterator[tuple[str, int, int]]:
    """What there may be too much of in vLLM's `SamplingParams`, how much there is, and the most.

    vLLM takes more of each, and then keeps all requests waiting, or ends the engine.
    """
    if params is None:  # of a pooling request
        return
    yield "Texts in `stop`", len(params.stop or ()), MOST_STOPS
    yield "Tokens in `stop_token_ids`", len(params.stop_token_ids or ()), MOST_STOPS
    yield "Tokens in `allowed_token_ids`", len(params.allowed_token_ids or ()), MOST_TOKENS
    yield "Tokens in `logit_bias`", len(params.logit_bias or ()), MOST_TOKENS
    bad_words = params.bad_words_token_ids or ()
    yield "Tokens in `bad_words`", sum(map(len, bad_words)), envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    if (repetition := params.repetition_detection) is not None:
        # Patterns of each length are compared with as many of their own tokens.
        compared = repetition.max_pattern_size**2 * repetition.min_count // 2
        what = "Half of `min_count` times the square of `max_pattern_size`"
        yield what, compared, MOST_COMPARISONS
    yield "`max_tokens`", params.max_tokens or 0, MOST_LENGTH
    yield "`seed`", params.seed or 0, MOST_SEED


def meter(processor: Any, state: Any) -> Meter:
    """What counts the tokens that a request generates; state: vLLM's `RequestState`."""
    detokenizer = state.detokenizer  # pooling requests have none, and generate nothing
    states, name = processor.request_states, state.request_id
    return Meter(
        read=(lambda: 0) if detokenizer is None else detokenizer.num_output_tokens,
        has_ended=lambda: states.get(name) is not state,
    )
