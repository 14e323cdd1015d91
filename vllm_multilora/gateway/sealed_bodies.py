"""Seals the calls that the gateway lets through on a server with tenants.

The engine of such a server answers sealed requests alone
(`integration/engine/requests/tenant_wall.py`). A seal says whose the call is. It goes in the body's
`cache_salt` or, on routes without that field, in `X-Request-Id`; there it is taken out of the
answer again, so that no client can use one elsewhere.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from vllm_multilora.gateway.changed_answers import ReplacedText
from vllm_multilora.gateway.names.bodies import JsonBody, again, read_body
from vllm_multilora.gateway.request_ids import id_of, with_id
from vllm_multilora.gateway.table import TENANT_ROUTES

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from vllm_multilora.integration.server.requests.callers import Caller

SALT_FIELD = "cache_salt"

_OPERATORS = frozenset(
    ("/inference/v1/generate", "/generative_scoring", "/v1/systemone", "/v1/decisions")
)
"""Paths with the field that tenants may not call."""
_ENDED_BY_ID = ("/score", "/rerank")
_WRONG_CHARACTERS = frozenset("@/\\\0")
_MAX_OWN = 128  # characters; vLLM refuses longer salts


def has_salt_field(path: str) -> bool:
    """Whether the bodies of a path have `cache_salt`."""
    path = path.rstrip("/")
    route = TENANT_ROUTES.get(path)
    return path in _OPERATORS or (route is not None and SALT_FIELD in route.plain)


def is_known_by_id(path: str) -> bool:
    """Whether the ids of a path's calls say whose they are: bodies there have no `cache_salt`.

    Or vLLM ends all requests with the id of a call whose client has gone: others may choose it.
    """
    return not has_salt_field(path) or path.rstrip("/").endswith(_ENDED_BY_ID)


def with_seal(content: dict[str, Any], body: bytes, caller: Caller) -> bytes:
    """A JSON body, which holds some content, with the caller's seal.

    A client's own salt divides its cache further; one that vLLM refuses stays, so that vLLM says
    what is wrong with it.
    """
    own = content.get(SALT_FIELD)
    is_text = isinstance(own, str) and 0 < len(own) <= _MAX_OWN
    if own is not None and not (is_text and _WRONG_CHARACTERS.isdisjoint(own)):
        return body
    seal = caller.seal(own)
    spliced = None if SALT_FIELD in content else _spliced(body, seal)
    return spliced or json.dumps({**content, SALT_FIELD: seal}).encode()


async def sealed_body(scope: Scope, receive: Receive, caller: Caller) -> Receive:
    """Reads the whole body of a call by somebody other than a tenant, and seals it.

    What is no JSON object is passed on as it is: vLLM refuses it.
    """
    fields, parts = await read_body(scope, receive)
    if isinstance(fields, JsonBody):
        body = b"".join(part.get("body", b"") for part in parts)
        with contextlib.suppress(ValueError, RecursionError):
            parts = [{**parts[-1], "body": with_seal(json.loads(body), body, caller)}]
    return again(parts, receive)


def sealed_by_id(scope: Scope, send: Send, caller: Caller) -> tuple[Scope, Send]:
    """A call with the caller's seal in its id, and what sends its answer without the seal."""
    own, carried = id_of(scope).replace(b"~", b"-"), f"~{caller.seal(None)}~"
    scope = with_id(scope, own + carried.encode("latin-1"))
    return scope, ReplacedText(send, carried, "").send


def _spliced(body: bytes, seal: str) -> bytes | None:
    """A body with a field more, without writing all of it again; None if it is not plain UTF-8."""
    body = body if body.startswith(b"{") else body.lstrip()
    if body[:1] != b"{" or json.detect_encoding(body) != "utf-8":
        return None
    rest = body[1:]
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return b'{"%s":"%s"%s%s' % (SALT_FIELD.encode(), seal.encode(), comma, rest)
