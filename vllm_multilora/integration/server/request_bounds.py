"""What a tenant's request may hold: with more, the engine would end, or everybody would wait."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import cache
from http import HTTPStatus
from typing import Any

from pydantic import FailFast
from pydantic_core import SchemaValidator
from vllm import envs
from vllm.entrypoints.generate.base.protocol import LegacyStructuralTagResponseFormat
from vllm.exceptions import GracefulHTTPError

from vllm_multilora.integration.server.callers import (
    current_caller,
    current_tenant,
    encoded_size,
)

logger = logging.getLogger(__name__)

MOST_TEXT = 1 << 20
"""Characters of a text of which tokens are made. Each may take half a kilobyte of memory, and two
microseconds in which nobody is answered."""

MOST_TEXT_OF_TOKEN = 16
"""More of them, for each token that the model takes."""

_SCORED = ("query", "queries", "items", "documents", "data_1", "data_2", "text_1", "text_2")
"""Fields of requests for scores, of whose texts vLLM makes tokens without `check_length`."""

MOST_ID = 1_024
"""Characters of its id, with which each of its tokens comes, and of its session's, which events of
the KV cache name with each block."""

MOST_STOPS = 64
"""Texts that end an answer to it, and tokens that do: all are looked for after each token. Most
endpoints take four texts."""

MOST_TOKENS = 1_024
"""Tokens that it may allow, or favour. With more, vLLM's second model runner ends its engine."""

MOST_REPEATED = 16 << 20
"""Bytes of a call that its answer repeats: nobody is answered while they are told."""

MOST_BYTES_OF = {"bad_words": 16 << 10, "structured_outputs": 256 << 10}
"""In UTF-8, with what holds them together. vLLM tokenizes the first while nobody else is answered,
for four seconds where they have a megabyte, and passes the second from process to process."""

MOST_NESTING = 64
"""Levels of lists and objects in what it has for others than vLLM's sampler: the engine reads them
by recursion, and ends where they are too many."""

MOST_COMPARISONS = 32_768
"""Of tokens, after each token, that its `repetition_detection` may take."""

MOST_LENGTH = 1 << 30
"""Of its answer, in tokens. Engines end at what their 32 bits do not hold."""

MOST_SEED = (1 << 63) - 1

_OF_MANY = ("list", "tuple", "set", "frozenset", "dict")
_NOT_OF_SCHEMA = ("default", "metadata")


def stop_at_first_errors(app: Any) -> None:
    """Has a server look no further in a list or an object of any fields that holds something wrong.

    vLLM says of each item of a list what is wrong with it, for each kind of item that there might
    be: of five thousand in `/v1/responses`, which are fifteen kilobytes, it takes seconds for that,
    in which nobody is answered, and six gigabytes of memory.

    Args:
        app: vLLM's, with all its routes.
    """
    _stop_at_first_errors_of_tags()
    for route in app.routes:
        dependant = getattr(route, "dependant", None)
        for field in [] if dependant is None else dependant.body_params:
            if (adapter := getattr(field, "_type_adapter", None)) is None:
                logger.warning("vLLM says of all in a list what is wrong: FastAPI is not as known.")
                return
            adapter.validator = SchemaValidator(
                _failing_fast(adapter.core_schema), _use_prebuilt=False
            )


@cache
def _stop_at_first_errors_of_tags() -> None:
    # vLLM looks at this part of a body by itself, before it looks at the rest.
    for name in ("structures", "triggers"):
        LegacyStructuralTagResponseFormat.model_fields[name].metadata.append(FailFast())
    LegacyStructuralTagResponseFormat.model_rebuild(force=True)


def _failing_fast(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_failing_fast(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value if key in _NOT_OF_SCHEMA else _failing_fast(value)
        for key, value in schema.items()
    }
    return {**made, "fail_fast": True} if made.get("type") in _OF_MANY else made


def require_short(params: Any) -> None:
    """Looks at a tenant's parameters before vLLM does, which may take long.

    Raises:
        GracefulHTTPError: There is too much of something.
    """
    for field, most in MOST_BYTES_OF.items():
        _require(f"Bytes of `{field}`", encoded_size(getattr(params, field, None)), most)


def require_few_repeats(request: Any, *, renders: bool) -> None:
    """Looks at what the answer to a tenant's call would repeat of it.

    That is every parameter, for each prompt of a completion that is rendered, and with `echo` the
    prompt or the last message for each answer, where a template may take little of a long message.

    Args:
        request: vLLM's, of an endpoint that takes a model name.
        renders: Whether the answer is one or several requests for `/inference/v1/generate`.

    Raises:
        GracefulHTTPError: It is too much.
    """
    caller, prompts = current_caller.get(), getattr(request, "prompt", None)
    if caller is None or caller.account is None:
        return
    size = again = 0
    if renders and isinstance(prompts, list):
        parameters = request.model_dump(exclude={"prompt"}, exclude_unset=True)
        size = len(json.dumps(parameters, default=str))
        again = sum(not isinstance(each, int) for each in prompts) - 1
    elif getattr(request, "echo", False):
        size, again = caller.body_bytes, (request.n or 1) - 1
    what = "Bytes of the call that its answer would repeat, for more than one prompt or answer"
    _require(what, size * again, MOST_REPEATED)


def check_length(original: Callable[..., str], params: Any, tokenizer: Any, text: str) -> str:
    """What is made into tokens of a text, after a look at how long a tenant's is.

    Args:
        original: vLLM's, which may cut it.
        params: vLLM's `TokenizeParams`.
        tokenizer: What is to make tokens of it.
        text: Anybody's.

    Raises:
        GracefulHTTPError: It is a tenant's, and too long.
    """
    text = original(params, tokenizer, text)
    if current_tenant() is not None:
        _require("Characters of a text", len(text), _most_text(params.max_total_tokens or 0))
    return text


def require_short_scored(request: Any, models: Any) -> None:
    """Looks at the texts that a tenant has scored.

    vLLM scores those of `/generative_scoring` by what the model generates, and makes tokens of all
    of them while nobody is answered.

    Args:
        request: One of vLLM's parsed requests, of any kind.
        models: vLLM's table of models.

    Raises:
        GracefulHTTPError: A text is too long; or all are together, there.
    """
    if current_tenant() is None:
        return
    lengths = [len(text) for field in _SCORED for text in _texts(getattr(request, field, None))]
    if not lengths:
        return
    most = _most_text(models.model_config.max_model_len)
    if hasattr(request, "item_first"):
        _require("Characters of all texts", sum(lengths), most)
    _require("Characters of a text", max(lengths), most)


def _texts(value: Any) -> Iterator[str]:
    """The texts among what is to be scored; images and the like are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(value.get("text"))
        yield from _texts(value.get("content"))
    elif isinstance(value, list) and not (value and isinstance(value[0], int)):
        for each in value:
            yield from _texts(each)


def _most_text(tokens: int) -> int:
    return max(MOST_TEXT, MOST_TEXT_OF_TOKEN * tokens)


def require_bounded(request: Any) -> None:
    """Looks at a tenant's request before it is sent.

    Raises:
        GracefulHTTPError: There is too much of something.
    """
    for what, found, most in _bounded(request):
        _require(what, found, most)


def _require(what: str, found: int, most: int) -> None:
    if found > most:
        message = f"{what}: found {found}, expected {most} at most."
        raise GracefulHTTPError(message, HTTPStatus.BAD_REQUEST)


def _bounded(request: Any) -> Iterator[tuple[str, int, int]]:
    """What there may be too much of in vLLM's request, how much there is, and the most."""
    yield "Characters of the request's id", len(request.request_id), MOST_ID
    yield "Characters of `session_id`", len(request.session_id or ""), MOST_ID
    kwargs = request.reasoning_parser_kwargs
    yield "Levels of `reasoning_parser_kwargs`", _levels(kwargs), MOST_NESTING
    if request.sampling_params is not None:  # as of a pooling request
        yield from _bounded_params(request.sampling_params)


def _levels(value: Any) -> int:
    """How deeply lists and objects nest, counted to one more than there may be."""
    level = [value]
    for found in range(MOST_NESTING + 1):
        level = [each for each in level if isinstance(each, (dict, list))]
        if not level:
            return found
        level = [
            each
            for outer in level
            for each in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return MOST_NESTING + 1


def _bounded_params(params: Any) -> Iterator[tuple[str, int, int]]:
    """The same of vLLM's `SamplingParams`."""
    yield "Levels of `kv_transfer_params`, `vllm_xargs`", _levels(params.extra_args), MOST_NESTING
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
