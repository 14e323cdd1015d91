"""What HTTP and the code that finds and runs adapters have to tell each other.

vLLM resolves a request's model name, and runs the request, far below HTTP. What both sides have to
tell each other travels in a context variable, which reaches every task that works for the request:
the request's headers in one direction, the adapter and its version in the other.

An answer says which version of an adapter made it:

- in the headers `x-multilora-adapter` and `x-multilora-version`. A stream's headers are sent before
  anything is computed; they name the version that the adapter's name stood for at that time, which
  the request is bound to;
- in the field `multilora` of the answer, or of a stream's first event once it is known, which names
  the version that computed it. The two differ if an adapter's files have changed without a
  registration, and its old version was no longer in memory.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_multilora.integration.server.access import (
    ACCESS,
    access_for,
    require_no_keys,
    settings_in,
)
from vllm_multilora.integration.server.access_middleware import (
    AccessMiddleware,
    PlainPathMiddleware,
)
from vllm_multilora.integration.server.activation import manages_adapters_behind
from vllm_multilora.integration.server.request_bounds import stop_at_first_errors

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.lora.request import LoRARequest

ADAPTER_HEADER = "x-multilora-adapter"
"""Names, in an answer, the adapter that made it, or that a route has led the request to."""

VERSION_HEADER = "x-multilora-version"
"""The adapter's version in an answer: the first digits of its digest."""

SHOWN_DIGITS = 16
"""Digits of a digest in answers."""

BLEND_FIELD = "lora_blend"
"""Of request bodies: a weight for each adapter that is to be blended."""

RENDERING = "/render"
"""End of the paths of endpoints whose answers are requests for `/inference/v1/generate`."""

DROPPING_JSON = ("/messages", "/inference/v1/generate", "/cohere/v2/chat", "/v2/embed", RENDERING)
"""Ends of the paths of endpoints that drop fields of their body which they do not know."""
_DROPPING_FORMS = ("/transcriptions", "/translations")
"""The same, of those that take forms."""

_ESCAPED = re.compile(rb"\\u00[5-7]")  # among them are all letters of the field
_FORM_FIELD = re.compile(rb'[\s;]name="?%s["\s;]' % BLEND_FIELD.encode(), re.IGNORECASE)
_LONGEST_FORM_FIELD = 32

_EVENT = b"data: {"

MOST_ERROR = 16_384
"""Characters of an error's text, which may repeat what its request holds."""
_LONG_RUN = re.compile(r"(\S{256})\S++|(\s{64})\s++")


@dataclass
class HttpCall:
    """One HTTP request, or one of a batch that a file holds.

    Attributes:
        headers: As the client sent them; names in any case.
        route: The route that the client asked for; None if it named a model.
        adapter: What the answer names: the adapter, or what a route has led to; None: nothing.
        lora: The adapter in the version that its name stood for; None for the base model.
        digest: The digest of that version, if it is known.
        asked: The digits of the digest that the client asked for; empty for any version.
        ran: The digest of the weights that have computed the answer; None before that.
        drops_blend: Whether the body asks for a blend, which the endpoint does not see.
        renders: Whether the answer is a request for `/inference/v1/generate`.
        is_http: Whether it came over HTTP.
    """

    headers: Mapping[str, str]
    route: str | None = None
    adapter: str | None = None
    lora: LoRARequest | None = None
    digest: str | None = None
    asked: str = ""
    ran: str | None = None
    drops_blend: bool = False
    renders: bool = False
    is_http: bool = True


current_call: ContextVar[HttpCall | None] = ContextVar("multilora_http_call", default=None)
"""The HTTP request that is being worked for; None outside of any."""


def look_for_call() -> None:
    """Has what did not come over HTTP (`vllm run-batch`, a WebSocket) be a call of its own."""
    call = current_call.get()
    if call is None or not call.is_http:
        current_call.set(HttpCall({}, is_http=False))


class HttpCallMiddleware:
    """Fills `current_call`, and names adapter and version in the answer, streamed ones included.

    Args:
        app: What answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = HttpCall(Headers(scope=scope))
        token = current_call.set(call)
        path = scope.get("path", "")
        call.renders = path.endswith(RENDERING)
        if path.endswith((*DROPPING_JSON, *_DROPPING_FORMS)):
            receive = _noticing(receive, call, is_form=path.endswith(_DROPPING_FORMS))
        try:
            await self._app(scope, receive, _Answer(call, send).send)
        finally:
            current_call.reset(token)


def _noticing(receive: Receive, call: HttpCall, *, is_form: bool) -> Receive:
    """Notices a field for a blend in a body: in a form as it passes, in JSON once it is whole."""
    seen = bytearray()

    async def receive_noticing() -> Message:
        message = await receive()
        seen.extend(message.get("body", b""))
        if is_form:
            call.drops_blend |= _FORM_FIELD.search(seen) is not None
            del seen[:-_LONGEST_FORM_FIELD]
        elif not message.get("more_body"):
            call.drops_blend |= _asks_for_blend(seen)
            seen.clear()
        return message

    return receive_noticing


def _asks_for_blend(body: bytearray) -> bool:
    """Whether JSON has a field for a blend; it is parsed only if it could have one."""
    # Letters may be escaped, and JSON in UTF-16 and UTF-32 has null bytes.
    if BLEND_FIELD.encode() not in body and b"\0" not in body and not _ESCAPED.search(body):
        return False
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):  # which the endpoint refuses
        return False
    return isinstance(content, dict) and content.get(BLEND_FIELD) is not None


class _Answer:
    """An answer on its way to the client."""

    def __init__(self, call: HttpCall, send: Send) -> None:
        self._call = call
        self._send = send
        self._start: Message | None = None  # held until the body is there
        self._is_complete = False  # nothing is to be added any more

    async def send(self, message: Message) -> None:
        if not self._is_complete:
            if message["type"] == "http.response.start":
                if self._begin(message):
                    return
            elif message["type"] == "http.response.body":
                message = self._named(message)
                if self._start is not None:
                    start, self._start = self._start, None
                    await self._send(start)
        await self._send(message)

    def _begin(self, start: Message) -> bool:
        """Adds the headers; whether they are to be held until the body is there."""
        call, headers = self._call, MutableHeaders(scope=start)
        if call.adapter is not None:
            # A header holds ASCII, and neither begins nor ends with spaces; other names are
            # percent-encoded, as in a URL.
            inner_space = " " if call.adapter == call.adapter.strip() else ""
            headers[ADAPTER_HEADER] = quote(call.adapter, safe="/:@+*" + inner_space)
        if call.digest is not None:
            headers[VERSION_HEADER] = call.digest[:SHOWN_DIGITS]
        kind = headers.get("content-type", "")
        is_json = kind.startswith("application/json")
        is_answer = call.lora is not None and start["status"] == 200
        self._is_complete = not is_answer or not (is_json or kind.startswith("text/event-stream"))
        if is_answer and is_json:
            self._start = start
        return self._start is not None

    def _named(self, message: Message) -> Message:
        """The first part of a body that can name what has computed it, with that in it."""
        body, ran, start = message.get("body", b""), self._call.ran, self._start
        event = 0 if start is not None else body.find(_EVENT)
        at = event if start is not None else event + len(_EVENT) - 1
        if start is not None:
            self._is_complete = True  # it is whole, or begins here
        if ran is None or event < 0 or body[at : at + 1] != b"{":
            return message
        self._is_complete = True
        field = _field(self._call, ran)
        rest = body[at + 1 :]
        named = b"".join((body[: at + 1], field, b"" if rest[:1] == b"}" else b",", rest))
        if start is not None:
            headers = MutableHeaders(scope=start)
            headers[VERSION_HEADER] = ran[:SHOWN_DIGITS]
            if (length := headers.get("content-length")) is not None:
                headers["content-length"] = str(int(length) + len(named) - len(body))
        return {**message, "body": named}


def _field(call: HttpCall, ran: str) -> bytes:
    assert call.lora is not None
    value = {"adapter": call.lora.lora_name, "version": ran[:SHOWN_DIGITS]}
    return b'"multilora":' + json.dumps(value, separators=(",", ":")).encode()


def init_entrypoints_middleware(
    original: Callable[..., None], args: Namespace, app: Any, *rest: Any, **kwargs: Any
) -> None:
    original(args, app, *rest, **kwargs)
    if settings_in(args) is None:
        require_no_keys(args)
        return
    ours = [Middleware(PlainPathMiddleware), Middleware(HttpCallMiddleware)]
    access = access_for(args)
    if access is not None:
        ACCESS.set(app, access)
        ours.insert(1, Middleware(AccessMiddleware, access=access))
        if access.locks.tenants:
            stop_at_first_errors(app)
    at = _first_check(app.user_middleware)
    app.user_middleware[at:at] = ours


def _first_check(stack: Sequence[Middleware]) -> int:
    """Where ours come among a server's middlewares, the first of which acts first.

    Right before vLLM's own checks: the operator's (`--middleware`) may give a request another path
    or key before, and name what is refused after, as they may for vLLM's.
    """
    kinds: list[Any] = [each.cls for each in stack]
    for check in (AuthenticationMiddleware, CORSMiddleware):
        if check in kinds:
            return len(kinds) - 1 - kinds[::-1].index(check)
    return 0


def sanitize_message(original: Callable[[str], str], message: str) -> str:
    """Takes a machine's paths out of an error's text, in bounded time.

    vLLM looks for them while nobody is answered, and takes a thousand times as long for ten times
    as long a run of names and slashes: nine seconds for eight kilobytes.

    Args:
        original: vLLM's.
        message: Of any length; clients choose parts of it.
    """
    if current_call.get() is None:  # the plugin does not act
        return original(message)
    shown = message if len(message) <= MOST_ERROR else f"{message[:MOST_ERROR]}..."
    return original(_LONG_RUN.sub(r"\1\2...", shown))


async def transform_request(original: Callable[..., Any], transform: Any, raw_request: Any) -> Any:
    """Of a call to `/invocations`: puts the model that SageMaker's header names into the body."""
    if not manages_adapters_behind(getattr(raw_request.app.state, "engine_client", None)):
        return await original(transform, raw_request)
    body = await raw_request.body()
    transformed = await original(transform, raw_request)
    content = await raw_request.json()
    in_header = (content.get("model") or "").strip()  # a proxy may have sent an empty one
    if not in_header and (named := json.loads(body).get("model")) is not None:
        content["model"] = named
        raw_request._body = json.dumps(content).encode()
    return transformed
