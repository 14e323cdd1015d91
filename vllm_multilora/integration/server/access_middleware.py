"""The middlewares of keys: who gets in, whose request it is, and when it has its turn.

They act right before vLLM's check of its API key, which stays in place, but accepts requests that
were admitted here as checked (`verify_token`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from vllm.entrypoints.anthropic.api_router import translate_error_response

from vllm_multilora.integration.server.access_log import keep_refusals_few
from vllm_multilora.integration.server.callers import Caller, current_caller, error_response
from vllm_multilora.integration.server.request_bounds import (
    MOST_NUMBERS,
    MOST_TOLD,
    LargeBodyError,
    whole_body,
)
from vllm_multilora.metrics.server_counts import COUNTS
from vllm_multilora.tenants.limits import (
    Account,
    LimitReachedError,
    Pace,
    ServerStoppedError,
    TokenBucket,
)
from vllm_multilora.tenants.rules import (
    INVOCATIONS,
    OF_TENANTS,
    Endpoint,
    Role,
    endpoint_of,
    refusal,
)
from vllm_multilora.wording import CONTROLS

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vllm_multilora.integration.server.access import Access

_REFUSALS = (HTTPStatus.NOT_FOUND, HTTPStatus.TOO_MANY_REQUESTS)
_MESSAGES = {
    HTTPStatus.UNAUTHORIZED: "The request has no valid key; expected `Authorization: Bearer KEY`.",
    HTTPStatus.FORBIDDEN: "The key does not allow this; expected an admin key or, on a server "
    "without one, the API key.",
    HTTPStatus.NOT_FOUND: "There is nothing at a path with control characters.",
}
_STATUS = {
    LimitReachedError: HTTPStatus.TOO_MANY_REQUESTS,
    ServerStoppedError: HTTPStatus.SERVICE_UNAVAILABLE,
    LargeBodyError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
}
_ANTHROPICS = ("/v1/messages", "/v1/messages/count_tokens")
_COHERES = "/cohere/v2/chat"
_FORMS = "/v1/audio/"
_OF_TOKENS = ("/derender", "/detokenize")
"""Ends of the paths of endpoints that make texts of tokens."""
_HELD_LIMIT = 1 << 20  # bytes of a waiting request's body that are read to notice that it has gone
_CLIENT_GONE = 499  # as proxies call it; nobody reads it
_NOT_OF_TENANTS = (b"endpoint-load-metrics-format", b"x-data-parallel-rank")
"""Headers that do nothing for tenants. One asks vLLM for some of `/metrics` with an answer, which
has all metrics collected while nobody is answered; the other names the engine that is to compute
it, and all of a tenant's requests together would hold up those of others there."""

STRANGERS_PER_MINUTE = 3_000
"""Requests without a valid key that are answered; after a minute without any, so many at once."""

LONGEST_PAUSE_S = 5.0
"""Until a request that has no turn is answered, however many there are; and until a tenant's next
list is begun."""

_PACED = (Endpoint.MODELS, Endpoint.STATUS, Endpoint.STORED)

LISTING_SHARE = 0.05
"""Of the event loop's time, for one tenant's lists of models, for those of adapters, and for its
stored responses."""


class PlainPathMiddleware:
    """Has no path with control characters reach an endpoint.

    The pattern of a Starlette route ends in `$`, which matches before a line break, too: the path
    of a request that gets to an endpoint could be another one than the endpoint's.

    Args:
        app: What answers the requests.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and CONTROLS.search(scope["path"]):
            await _refuse(HTTPStatus.NOT_FOUND, scope, receive, send)
        else:
            await self._app(scope, receive, send)


class AccessMiddleware:
    """Answers what nobody may ask, and says who asks for the rest.

    Args:
        app: What answers the requests.
        access: The server's keys.
        strangers_per_minute: See `STRANGERS_PER_MINUTE`.
    """

    def __init__(
        self, app: ASGIApp, access: Access, strangers_per_minute: float = STRANGERS_PER_MINUTE
    ) -> None:
        self._app = app
        self._access = access
        self._strangers = TokenBucket(strangers_per_minute)
        keep_refusals_few()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._access.watch()  # from the server's start on, of which it is told as of a request
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if is_preflight(scope, headers):
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        endpoint = endpoint_of(scope.get("method", "GET"), path)
        caller = self._access.caller(presented_key(headers))
        status = refusal(self._access.locks, caller.role, endpoint, path)
        if status is not None:
            COUNTS.count_refused(None if caller.tenant is None else caller.tenant.name, status)
            if caller.account is not None:
                await _pause(caller.account.without_turn)
            elif status is HTTPStatus.UNAUTHORIZED:
                await _pause(self._strangers)
            await _refuse(status, scope, receive, send)
            return
        token = current_caller.set(caller)
        try:
            if caller.account is not None and endpoint in OF_TENANTS:
                await self._call(caller, caller.account, endpoint, scope, receive, send)
            elif caller.role is Role.STRANGER:
                await self._app(scope, receive, self._refusing(send))
            else:
                await self._app(scope, receive, send)
        finally:
            current_caller.reset(token)
            caller.ended()

    def _refusing(self, send: Send) -> Send:
        """Counts what vLLM's own check of its API key refuses, and has it wait, as `__call__` does.

        Without tenants, that check answers most of the strangers.
        """

        async def send_refusal(message: Message) -> None:
            if message.get("status") == HTTPStatus.UNAUTHORIZED:
                COUNTS.count_refused(None, HTTPStatus.UNAUTHORIZED)
                await _pause(self._strangers)
            await send(message)

        return send_refusal

    async def _list(self, pace: Pace, scope: Scope, receive: Receive, send: Send) -> None:
        """Lists a tenant's models or adapters, or tells a stored response, one after the other.

        However much that is, and however often it asks, nobody else waits for it for long. The next
        one waits for neither this one's reader nor what is done for others meanwhile. Of what is
        told in many pieces, each is one more.

        Raises:
            LimitReachedError: Too many lists were asked for before this one.
        """
        try:
            async with asyncio.timeout(2 * LONGEST_PAUSE_S):
                await pace.begin()
        except TimeoutError:
            raise LimitReachedError("it is asked for faster than it can be told") from None
        messages, told_s = 0, 0.0

        def let_next_begin() -> None:
            nonlocal told_s
            spent_s, told_s = making.seconds - told_s, making.seconds
            pace.end(min(spent_s / LISTING_SHARE, LONGEST_PAUSE_S))

        async def send_made(message: Message) -> None:
            nonlocal messages
            messages += 1
            is_more = messages > 2 and bool(message.get("body"))  # a list has a head and a body
            if is_more:
                await pace.begin()
            if is_more or messages == 1:
                let_next_begin()
            await send(message)

        making = _Timed(self._app(scope, receive, send_made))
        try:
            await making
        finally:
            if not messages:
                let_next_begin()

    async def _call(
        self,
        caller: Caller,
        account: Account,
        endpoint: Endpoint,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Lets a tenant's request in; a call, or a list, when it has its turn.

        What is refused waits where there is much.
        """
        path = route_path(scope)
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in _NOT_OF_TENANTS]

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                if caller.retry_after_s is not None:
                    MutableHeaders(scope=message)["retry-after"] = str(caller.retry_after_s)
                if message["status"] in _REFUSALS:
                    COUNTS.count_refused(account.tenant.name, message["status"])
            await send(message)

        try:
            if endpoint is Endpoint.CALL:
                receive = await turn_of(account, receive)
                caller.has_turn = True
                if scope["type"] == "http":
                    receive, caller.body_bytes = await whole_body(
                        receive,
                        is_form=path.startswith(_FORMS),
                        is_of_any_kind=path == INVOCATIONS,
                        most_numbers=MOST_TOLD if path.endswith(_OF_TOKENS) else MOST_NUMBERS,
                    )
            if endpoint in _PACED:
                await self._list(account.listing[endpoint], scope, receive, send_marked)
            else:
                await self._app(scope, receive, send_marked)
        except (LimitReachedError, ServerStoppedError, LargeBodyError) as error:
            if isinstance(error, LimitReachedError):
                caller.retry_after_s = error.retry_after_s
                await _pause(account.without_turn)
            answer = error_answer(_STATUS[type(error)], str(error), path=path)
            await answer(scope, receive, send_marked)
        except _ClientGoneError:  # for middlewares of the operator's, which expect an answer
            await Response(status_code=_CLIENT_GONE)(scope, receive, send_marked)


async def _pause(requests: TokenBucket) -> None:
    """Has a request that has no turn wait for its answer where there are many.

    A connection's next request is looked at when its last one has been answered, so that floods
    wait in the system's buffers and cost the event loop next to nothing.

    Args:
        requests: Counts those of its kind.
    """
    wait_s = requests.wait_s()
    if wait_s < LONGEST_PAUSE_S:
        requests.charge(1)
    if wait_s > 0:
        await asyncio.sleep(min(wait_s, LONGEST_PAUSE_S))


class _Timed:
    """Something to be awaited, and how long it keeps the event loop busy itself."""

    def __init__(self, work: Awaitable[None]) -> None:
        self._work = work
        self._seconds = 0.0
        self._since: float | None = None  # when it was resumed; None while others are

    @property
    def seconds(self) -> float:
        """Of this thread's processor time, so far."""
        return self._seconds + (0.0 if self._since is None else time.thread_time() - self._since)

    def __await__(self) -> Generator[Any, Any, None]:
        work = self._work.__await__()
        resume: Callable[[Any], Any] = work.send
        value: Any = None
        while True:
            self._since = time.thread_time()
            try:
                awaited = resume(value)
            except StopIteration:
                return
            finally:
                self._seconds, self._since = self.seconds, None
            try:
                resume, value = work.send, (yield awaited)
            except BaseException as error:
                resume, value = work.throw, error


class _ClientGoneError(Exception):
    """A client went before its request had its turn."""


async def turn_of(account: Account, receive: Receive) -> Receive:
    """Waits for a call's turn, for as long as its client does; whoever has had it ends it.

    Returns:
        What the application receives from: what came while the call waited, and then the rest.

    Raises:
        LimitReachedError: The call is one too many.
        ServerStoppedError: No call has its turn any more.
        _ClientGoneError: The client has gone.
    """
    turn = account.begin()
    held: list[Message] = []
    if not turn.done():
        listening = asyncio.ensure_future(_listen(receive, held))
        try:
            await asyncio.wait({turn, listening}, return_when=asyncio.FIRST_COMPLETED)
            if not _has_gone(held):  # it may have sent more than is held: it is not heard then
                await asyncio.wait({turn})
        except BaseException:
            account.give_up(turn)
            raise
        finally:
            listening.cancel()
        if _has_gone(held):
            account.give_up(turn)
            raise _ClientGoneError
        turn.result()

    async def receive_rest() -> Message:
        return held.pop(0) if held else await receive()

    return receive_rest


async def _listen(receive: Receive, held: list[Message]) -> None:
    size = 0
    while size < _HELD_LIMIT and not _has_gone(held):
        message = await receive()
        held.append(message)
        size += len(message.get("body", b""))


def _has_gone(held: list[Message]) -> bool:
    return bool(held) and held[-1]["type"] == "http.disconnect"


async def _refuse(status: HTTPStatus, scope: Scope, receive: Receive, send: Send) -> None:
    answer = error_answer(status, _MESSAGES[status], path=route_path(scope))
    if status is HTTPStatus.UNAUTHORIZED:
        answer.headers["www-authenticate"] = "Bearer"
    await answer(scope, receive, send)


def error_answer(status: HTTPStatus, message: str, *, path: str) -> JSONResponse:
    """An error as clients of an endpoint read it: vLLM's has Anthropic's and Cohere's APIs, too.

    Args:
        status: Of the answer.
        message: For people.
        path: The endpoint's, without the server's root path.
    """
    error = error_response(status, message)
    if path in _ANTHROPICS:
        return translate_error_response(error)
    if path == _COHERES:
        return JSONResponse({"message": message}, status)  # whose protocol needs their SDK
    return JSONResponse(error.model_dump(), status)


def is_preflight(scope: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether vLLM's CORS middleware answers a request, as browsers send it ahead of another.

    Any other one with the method OPTIONS reaches the endpoints: `/metrics` answers all methods.
    """
    asks = "origin" in headers and "access-control-request-method" in headers
    return asks and scope.get("method") == "OPTIONS"


def route_path(scope: Mapping[str, Any]) -> str:
    """The path by which Starlette finds a route: without the root path that a proxy has added."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in a request's headers: a bearer token, or `x-api-key` as Anthropic's clients send.

    None where there is none.
    """
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token
    return headers.get("x-api-key")


def verify_token(original: Callable[..., bool], self: Any, headers: Any) -> bool:
    caller = current_caller.get()
    if caller is not None and caller.role is not Role.STRANGER:
        return True
    return original(self, headers)
