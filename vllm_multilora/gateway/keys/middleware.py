"""Finds out who sends each request, refuses what they may not ask, and gives tenants their turns.

It stands in front of vLLM's own check of `--api-key`. Requests of known callers carry vLLM's key on
from here, so that check lets them pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response

from vllm_multilora.adapters.problems import shown_name
from vllm_multilora.gateway.body import LargeBodyError, read_body
from vllm_multilora.gateway.endpoints import endpoint_of, error_answer, route_path
from vllm_multilora.gateway.fields import MAX_SHORT_TEXT, FieldError, needs
from vllm_multilora.gateway.first_errors import FirstErrors
from vllm_multilora.gateway.limits.tenant_turns import (
    STRANGERS_PER_MINUTE,
    ClientGoneError,
    list_in_turn,
    pause,
    turn_of,
)
from vllm_multilora.gateway.sealed_bodies import (
    has_salt_field,
    is_known_by_id,
    sealed_body,
    sealed_by_id,
)
from vllm_multilora.gateway.table import TENANT_ROUTES
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.metrics.server_counts import COUNTS
from vllm_multilora.tenants.limits import LimitReachedError, ServerStoppedError, TokenBucket
from vllm_multilora.tenants.rules import OF_TENANTS, Endpoint, Role, refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from vllm_multilora.gateway.keys.access import Access

_REFUSALS = (HTTPStatus.NOT_FOUND, HTTPStatus.TOO_MANY_REQUESTS)
_MESSAGES = {
    HTTPStatus.UNAUTHORIZED: "The request has no valid key; expected `Authorization: Bearer KEY`.",
    HTTPStatus.FORBIDDEN: "The key does not allow this; expected an admin key or, on a server "
    "without one, the API key.",
}
_STATUS: dict[type[Exception], HTTPStatus] = {
    LimitReachedError: HTTPStatus.TOO_MANY_REQUESTS,
    ServerStoppedError: HTTPStatus.SERVICE_UNAVAILABLE,
    LargeBodyError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    FieldError: HTTPStatus.BAD_REQUEST,
}
_CLIENT_GONE = 499  # as proxies call it; nobody reads it
_DROPPED_HEADERS = (b"endpoint-load-metrics-format", b"x-data-parallel-rank")
"""Headers that tenants' requests lose. The first has vLLM collect all metrics for one answer, while
nobody else is answered. The second chooses the engine, where one tenant's requests would then hold
up others'."""

_ECHOED_HEADERS = (b"x-request-id", b"traceparent", b"tracestate")
_PACED = (Endpoint.MODELS, Endpoint.STATUS)


class AccessMiddleware:
    """Refuses what a caller may not ask, and passes the rest on with its caller known."""

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        errors: FirstErrors | None = None,
        *,
        strangers_per_minute: float = STRANGERS_PER_MINUTE,
    ) -> None:
        self._app = app
        self._access = access
        self._errors = errors or FirstErrors([])
        self._strangers = TokenBucket(strangers_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._access.watch()  # from the server's start on: its lifespan comes by here, too
        is_call = scope["type"] in ("http", "websocket")
        if not is_call or is_preflight(scope, headers := Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        endpoint = endpoint_of(scope.get("method", "GET"), path)
        caller = self._access.caller(presented_key(headers))
        status = refusal(self._access.locks, caller.role, endpoint, path)
        message = "" if status is None else _MESSAGES[status]
        if status is None and caller.tenant is not None and endpoint is Endpoint.CALL:
            word = TENANT_ROUTES[path.rstrip("/")].word
            if word is not None and word not in caller.tenant.allow:
                status, message = HTTPStatus.FORBIDDEN, f"This path is {needs(word)}."
        elif caller.tenant is not None and endpoint is Endpoint.OTHER:
            called = f"{scope.get('method', 'GET')} {shown_name(path)}"
            message = f"Tenants may not call {called}: it is mistyped, or for operators."
        if status is None and scope["type"] == "websocket" and self._access.locks.tenants:
            status, message = HTTPStatus.FORBIDDEN, "A server with tenants has no WebSockets."
        if status is not None:
            COUNTS.count_refused(None if caller.tenant is None else caller.tenant.name, status)
            answer = error_answer(status, message, path=path)
            if caller.account is not None:
                await pause(caller.account.without_turn)
            elif status is HTTPStatus.UNAUTHORIZED:
                await pause(self._strangers)
            await answer(scope, receive, send)
            return
        if caller.role is not Role.STRANGER:
            scope = self._with_server_key(scope)
        token = current_caller.set(caller)
        try:
            if caller.account is not None and endpoint in OF_TENANTS:
                await self._call(caller, endpoint, scope, receive, send)
                return
            if caller.role is Role.STRANGER:
                send = self._refusing(scope, receive, send)
            elif self._access.locks.tenants and scope.get("method") == "POST":
                if has_salt_field(path):
                    receive = await sealed_body(scope, receive, caller)
                else:
                    scope, send = sealed_by_id(scope, send, caller)
            await self._app(scope, receive, send)
        finally:
            current_caller.reset(token)
            caller.ended()

    def _with_server_key(self, scope: Scope) -> Scope:
        if (key := self._access.forwarded_key) is None:
            return scope
        headers = [pair for pair in scope["headers"] if pair[0] != b"authorization"]
        return {**scope, "headers": [*headers, (b"authorization", f"Bearer {key}".encode())]}

    def _refusing(self, scope: Scope, receive: Receive, send: Send) -> Send:
        """Answers for vLLM's own check of its API key, as `__call__` does: later, and alike.

        Without tenants, that check refuses most of the strangers.
        """
        is_refused = False

        async def send_refusal(message: Message) -> None:
            nonlocal is_refused
            if message.get("status") == HTTPStatus.UNAUTHORIZED:
                is_refused, status = True, HTTPStatus.UNAUTHORIZED
                COUNTS.count_refused(None, status)
                await pause(self._strangers)
                answer = error_answer(status, _MESSAGES[status], path=route_path(scope))
                await answer(scope, receive, send)
            elif not is_refused:
                await send(message)

        return send_refusal

    async def _call(
        self, caller: Caller, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Passes a tenant's request on when it has its turn; delays refusals that are many."""
        account, path = caller.account, route_path(scope)
        assert account is not None
        headers = [pair for pair in scope["headers"] if pair[0] not in _DROPPED_HEADERS]
        scope = {**scope, "headers": headers}

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = account.rate_headers()
                if caller.retry_after_s is not None:
                    added["retry-after"] = str(caller.retry_after_s)
                if added:
                    MutableHeaders(scope=message).update(added)
                if message["status"] in _REFUSALS:
                    COUNTS.count_refused(account.tenant.name, message["status"])
            await send(message)

        send_on: Send = send_marked
        try:
            _require_short(headers)
            if endpoint is Endpoint.CALL:
                receive = await turn_of(account, receive)
                caller.has_turn = True
                path = path.rstrip("/")
                check = partial(self._errors.check, path)
                receive = await read_body(receive, TENANT_ROUTES[path], caller, check)
                if is_known_by_id(path):
                    scope, send_on = sealed_by_id(scope, send_on, caller)
            if endpoint in _PACED:
                await list_in_turn(self._app, account.listing[endpoint], scope, receive, send_on)
            else:
                await self._app(scope, receive, send_on)
        except tuple(_STATUS) as error:
            if isinstance(error, LimitReachedError):
                caller.retry_after_s = error.retry_after_s
                await pause(account.without_turn)
            param = getattr(error, "param", None)
            answer = error_answer(_STATUS[type(error)], str(error), path=path, param=param)
            await answer(scope, receive, send_on)
        except ClientGoneError:  # operators' middlewares expect an answer
            await Response(status_code=_CLIENT_GONE)(scope, receive, send_on)


def _require_short(headers: list[tuple[bytes, bytes]]) -> None:
    """Looks at what goes to the engine with a request and comes back with each of its tokens."""
    for name, value in headers:
        if name in _ECHOED_HEADERS and len(value) > MAX_SHORT_TEXT:
            raise FieldError(
                f"Header `{name.decode()}`: found {len(value)} characters, expected "
                f"{MAX_SHORT_TEXT} at most."
            )


def is_preflight(scope: Mapping[str, Any], headers: Mapping[str, str]) -> bool:
    """Whether vLLM's CORS middleware answers a request, as browsers send it ahead of another.

    Any other one with the method OPTIONS reaches the endpoints: `/metrics` answers all methods.
    """
    asks = "origin" in headers and "access-control-request-method" in headers
    return asks and scope.get("method") == "OPTIONS"


def presented_key(headers: Mapping[str, str]) -> str | None:
    """The key in headers: a bearer token, or `x-api-key` as Anthropic's clients send; or None."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token
    return headers.get("x-api-key")
