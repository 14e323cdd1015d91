"""Requests' bodies, such with another model's name.

JSON is scanned once, and only the fields that somebody looks at are read. All others stay the
bytes that they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from vllm_multilora.gateway.endpoints import header

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

MODEL = "model"

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.json.Encoder()
_FORM = b"multipart/form-data"
_QUOTED = str.maketrans({'"': "%22", "\r": "%0D", "\n": "%0A"})


class JsonBody(dict[str, Any]):
    """The JSON of each field of an object, by name; `get` reads it."""

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            return default
        try:
            return json.loads(bytes(self[name]))
        except (ValueError, RecursionError):  # a number of too many digits, or too many levels
            return default  # vLLM cannot read it either

    async def written(self, model: str, without: str) -> tuple[bytes, bytes | None]:
        """The body with another model's name, without one field; its type stays as it is."""
        fields = {**self, MODEL: _written(model)}
        fields.pop(without, None)
        pairs = [b"%b:%b" % (_written(name), value) for name, value in fields.items()]
        return b"{%b}" % b",".join(pairs), None


def _written(text: str) -> bytes:
    """A text as JSON, in ASCII: it may be no Unicode."""
    return _TEXT.encode(text) if text.isascii() else json.dumps(text).encode()


class FormBody(dict[str, Any]):
    """The fields of a form. Of several fields of a name, the last one counts, as for vLLM."""

    def __init__(self, items: list[tuple[str, str | UploadFile]]) -> None:
        super().__init__(items)
        self._items = items

    async def written(self, model: str, without: str) -> tuple[bytes, bytes | None]:
        """The form with another model's name, without one field, and its type."""
        boundary = secrets.token_hex(16)
        parts = []
        kept = [(name, value) for name, value in self._items if name not in (MODEL, without)]
        for name, value in [*kept, (MODEL, model)]:
            head = f'content-disposition: form-data; name="{name.translate(_QUOTED)}"'
            if isinstance(value, str):
                content = value.encode()
            else:
                await value.seek(0)
                content = await value.read()
                head += f'; filename="{(value.filename or "").translate(_QUOTED)}"'
                if value.content_type:
                    head += f"\r\ncontent-type: {value.content_type}"
            parts.append(f"--{boundary}\r\n{head}\r\n\r\n".encode() + content + b"\r\n")
        end = f"--{boundary}--\r\n".encode()
        return b"".join((*parts, end)), _FORM + f"; boundary={boundary}".encode()


async def read_body(
    scope: Scope, receive: Receive
) -> tuple[JsonBody | FormBody | None, list[Message]]:
    """Reads a request's body.

    Returns:
        The body, None where it is neither a form nor a JSON object, or did not come whole; and
        the messages that it came in.
    """
    parts = [await receive()]
    while parts[-1].get("more_body", False):
        parts.append(await receive())
    body: JsonBody | FormBody | None = None
    if parts[-1]["type"] != "http.request":
        pass  # the client has gone
    elif (header(scope["headers"], b"content-type") or b"").lower().startswith(_FORM):
        with contextlib.suppress(HTTPException):  # vLLM answers it as it does without the gateway
            form = await Request(scope, again(parts, receive)).form()
            body = FormBody(form.multi_items())
    else:
        body = read_json(b"".join(part.get("body", b"") for part in parts))
    return body, parts


def again(parts: list[Message], receive: Receive) -> Receive:
    """What gives messages once more, with others' turns between them, and then what still comes."""
    rest, count = deque(parts), len(parts)

    async def receive_again() -> Message:
        if not rest:
            return await receive()
        if len(rest) < count:
            await asyncio.sleep(0)  # vLLM takes forms apart on the event loop
        return rest.popleft()  # kept no longer than vLLM keeps it

    return receive_again


def read_json(body: bytes) -> JsonBody | None:
    """The fields of a JSON object; None for all else, and for what vLLM cannot read either."""
    try:
        fields = _FIELDS.decode(body)
        if body.isascii() or body.decode():
            return JsonBody(fields)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass  # Python's parser takes more: NaN, UTF-16, lone surrogates
    try:
        content = json.loads(body)
        if not isinstance(content, dict):
            return None
        return JsonBody({name: json.dumps(value).encode() for name, value in content.items()})
    except (ValueError, RecursionError):
        return None


def as_json(name: str) -> str:
    """A name as it stands in a JSON text, in ASCII."""
    return json.dumps(name)[1:-1]
