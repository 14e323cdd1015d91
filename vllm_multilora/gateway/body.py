"""Reads the bodies of tenants' calls within limits, before vLLM does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from vllm_multilora.errors import MultiLoRAError
from vllm_multilora.gateway.fields import FieldError, check_body
from vllm_multilora.gateway.names.bodies import again
from vllm_multilora.gateway.sealed_bodies import SALT_FIELD, with_seal
from vllm_multilora.gateway.table import Route
from vllm_multilora.tenants.tenant import MEDIA

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive

    from vllm_multilora.integration.server.requests.callers import Caller

MAX_BODY_BYTES = 4 << 20
"""Bytes of a call's body: some seconds of a thread that makes tokens of text, at worst."""

MAX_MEDIA_BODY_BYTES = 64 << 20
"""Bytes of a call's body where the tenant may send media."""

DROPPED_BODIES = 8
"""Times the limit that is read of a body that is too large, so that its client sees the answer."""

MAX_VALUES = 32_768
"""Values in a body besides numbers. vLLM reads one in up to 50 us, while nobody is answered."""

MAX_NUMBERS = 4 << 20
"""Values in all: tokens of prompts are numbers."""

MAX_TOKENS_REPORTED = 128 << 10
"""Values in all where text is made of tokens: 20 us each, on the thread that all texts share."""

MAX_REPEATED_BYTES = 16 << 20
"""Bytes of a body that go to the engine again for each answer but the first, or come back with
`echo`, while nobody else is answered."""

MAX_ECHOED_SCORES = 65_536
"""Log probabilities of a prompt's tokens, for which `echo` asks; a token has a byte at least."""

_NUMBER_BYTES = b"0123456789+-.eE \t\r\n"


class LargeBodyError(MultiLoRAError):
    """A call's body is too large, or has too many values."""


async def read_body(
    receive: Receive, route: Route, caller: Caller, check: Callable[[bytes], None]
) -> Receive:
    """Reads a tenant's call whole, as vLLM would, and checks it before vLLM does.

    A form is not checked, and is passed on in the parts in which it came. Any other body is passed
    to `check` besides, which raises `FieldError`, once it is known to be allowed.

    Returns:
        What vLLM receives from: the body, and then whatever the client still sends.

    Raises:
        LargeBodyError: There is too much in the body.
        FieldError: Something in it is not allowed.
    """
    allow = frozenset[str]() if caller.tenant is None else caller.tenant.allow
    parts = await _read_parts(receive, MAX_MEDIA_BODY_BYTES if MEDIA in allow else MAX_BODY_BYTES)
    if (last := parts[-1])["type"] != "http.request":
        parts = [last]  # the client has gone
    elif not route.is_form:
        body = b"".join(part.get("body", b"") for part in parts)
        caller.body_bytes = len(body)
        max_numbers = MAX_TOKENS_REPORTED if route.is_decoding else MAX_NUMBERS
        _require_few_values(body, max_numbers, counts_numbers=route.is_of_any_kind)
        checked = _checked(body, route, caller, allow)
        check(body)
        parts = [{**last, "body": checked}]
    return again(parts, receive)


async def _read_parts(receive: Receive, max_bytes: int) -> list[Message]:
    """A body's parts; of one that is too large, some more is read and dropped.

    An answer before the whole body has been read resets the connection of most clients, which then
    never see why they were refused.
    """
    parts: list[Message] = []
    size, has_more = 0, True
    while has_more and size <= DROPPED_BODIES * max_bytes:
        message = await receive()
        size += len(message.get("body", b""))
        if size > max_bytes:
            parts.clear()
        else:
            parts.append(message)
        has_more = message.get("more_body", False)
    if size > max_bytes:
        raise LargeBodyError(f"Bytes of the body: expected {max_bytes} at most.")
    return parts


def _checked(body: bytes, route: Route, caller: Caller, allow: frozenset[str]) -> bytes:
    try:
        content = json.loads(body)
    except RecursionError:
        raise FieldError("The body has too many levels of lists and objects.") from None
    except ValueError:
        raise FieldError("The body is not JSON.") from None
    changes = check_body(content, route, allow)
    _require_few_repeats(content, len(body))
    if changes:
        content = {**content, **changes}
        body = json.dumps(content).encode()
    return with_seal(content, body, caller) if SALT_FIELD in route.plain else body


def _require_few_repeats(content: dict[str, Any], size: int) -> None:
    """Looks at what is sent or told once for each answer."""
    repeated = size * ((content.get("n") or 1) - 1)
    if repeated > MAX_REPEATED_BYTES:
        raise FieldError(
            f"Bytes of the body that would be repeated for all answers but the first: found "
            f"{repeated}, expected {MAX_REPEATED_BYTES} at most.",
            "n",
        )
    scores = content.get("logprobs") if content.get("echo") else None
    is_few = isinstance(scores, int) and 0 <= scores < MAX_ECHOED_SCORES // size
    if not (scores is None or is_few):
        raise FieldError(
            f"`logprobs` with `echo`: found {str(scores)[:20]} in a body of {size} bytes; of "
            f"(`logprobs` + 1) times the bytes, expected {MAX_ECHOED_SCORES} at most.",
            "logprobs",
        )


def _require_few_values(body: bytes, most_numbers: int, *, counts_numbers: bool) -> None:
    if len(body) <= MAX_VALUES:  # each takes a byte at least
        return
    if not (encoding := json.detect_encoding(body)).startswith("utf-8"):
        body = body.decode(encoding, "replace").encode()
    if body.count(b",") > most_numbers:
        raise LargeBodyError(f"Values in the body: expected {most_numbers} at most.")
    if _values_in(body) <= MAX_VALUES:
        return
    # Whole operations on bytes alone: a search for each text or number would take half a minute.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if (found := plain.count(b'"') // 4) <= MAX_VALUES:  # of texts, half may be names of fields
        outside = b'"'.join(plain.split(b'"')[::2])
        if not counts_numbers:
            outside = outside.translate(None, _NUMBER_BYTES)
            while b",," in outside:
                outside = outside.replace(b",,", b",")
        found = _values_in(outside)
    if found > MAX_VALUES:
        which = "" if counts_numbers else " besides numbers"
        raise LargeBodyError(
            f"Values in the body{which}: found {found}, expected {MAX_VALUES} at most."
        )


def _values_in(text: bytes) -> int:
    # A field's value may be a number, which is not there any more.
    return max(text.count(b":"), text.count(b",") + text.count(b"[") + text.count(b"{"))
