"""Reads the bodies of tenants' calls within limits, before vLLM does."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from typing import TYPE_CHECKING

from vllm_multilora.errors import MultiLoRAError

if TYPE_CHECKING:
    from starlette.types import Message, Receive

MAX_BODY_BYTES = 64 << 20
"""Bytes of a call's body, which vLLM reads whole before it looks at any of it."""

MAX_VALUES = 32_768
"""Values in a body besides numbers. vLLM reads one in up to 50 us, while nobody is answered."""

MAX_NUMBERS = 4 << 20
"""Values in all: tokens of prompts are numbers."""

MAX_TOKENS_TOLD = 128 << 10
"""Values in all where text is made of tokens: 20 us each, on the thread that all texts share."""

_NUMBER_BYTES = b"0123456789+-.eE \t\r\n"


class LargeBodyError(MultiLoRAError):
    """There is too much in a call's body."""


async def whole_body(
    receive: Receive,
    *,
    is_form: bool,
    is_of_any_kind: bool = False,
    most_numbers: int = MAX_NUMBERS,
) -> tuple[Receive, int]:
    """Takes a tenant's call in, as vLLM would, and looks at it before vLLM does.

    Args:
        receive: The client.
        is_form: Whether it is one; all others are JSON, whatever their headers say.
        is_of_any_kind: Whether vLLM tries it as each kind of request that there is, and finds out
            all that is wrong with it as each: numbers count as other values do then.
        most_numbers: Values that it may have in all.

    Returns:
        What the application receives from: the body in one piece, and then the rest. A form is in
        the parts in which it came, with others' turns between them: it is taken apart on the event
        loop, byte by byte where a client wants that, which takes half a minute for the largest.
        And how many bytes the body has.

    Raises:
        LargeBodyError: There is too much in it.
    """
    parts: deque[Message] = deque()
    size, has_more = 0, True
    while has_more:
        parts.append(await receive())
        size += len(parts[-1].get("body", b""))
        if size > MAX_BODY_BYTES:
            raise LargeBodyError(f"Bytes of the body: expected {MAX_BODY_BYTES} at most.")
        has_more = parts[-1].get("more_body", False)
    if (last := parts[-1])["type"] != "http.request":
        parts = deque([last])  # the client has gone
    elif not is_form:
        body = b"".join(part.get("body", b"") for part in parts)
        parts = deque([{**last, "body": body}])
        _require_few_values(body, most_numbers, counts_numbers=is_of_any_kind)

    async def receive_whole() -> Message:
        if is_form:
            await asyncio.sleep(0)
        return parts.popleft() if parts else await receive()

    return receive_whole, size


def _require_few_values(body: bytes, most_numbers: int, *, counts_numbers: bool) -> None:
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
