"""Puts the name of one version of an adapter in the place of the name in a request's body.

Every endpoint of vLLM's looks its model up in one table, by name. The gateway reads the name in the
body, finds the adapter, and writes a name into the body that stands for this version in the table
until the request has been answered. A reload changes nothing for requests that are on their way.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from vllm_multilora.adapters.blend import BLEND_FIELD
from vllm_multilora.gateway.endpoints import endpoint_of
from vllm_multilora.gateway.names.bodies import MODEL, FormBody, JsonBody, again, read_body
from vllm_multilora.gateway.names.realtime import only_base_model
from vllm_multilora.gateway.refused_answers import error_answer, refusal_answer
from vllm_multilora.gateway.replaced_text import ReplacedText
from vllm_multilora.integration.server.names.model_names import TAKE_DEFAULTS, Chosen, choose
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call
from vllm_multilora.tenants.rules import INVOCATIONS, Endpoint

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from vllm.lora.request import LoRARequest

SAGEMAKER_HEADER = b"x-amzn-sagemaker-adapter-identifier"
"""Replaces the `model` of bodies at `/invocations`; without the header SageMaker drops `model`."""

_SHOWN_RESULTS = ("/embeddings", "/pooling", INVOCATIONS)
"""Ends of the paths whose bodies have an `encoding_format`, `float` by default."""
_COHERE_EMBEDDINGS = "/v2/embed"
_SECRET_BYTES = 8


class VersionNames:
    """Registers versions of adapters in vLLM's table; used on the server's event loop only.

    Nobody can guess the names. They do not get out of this process: answers have the public names.

    Args:
        table: vLLM's adapters, by the names that its endpoints look up.
    """

    def __init__(self, table: dict[str, LoRARequest]) -> None:
        self._table = table
        self._secret = secrets.token_hex(_SECRET_BYTES)
        self._users: Counter[str] = Counter()

    def name_of(self, lora: LoRARequest) -> str:
        """The name of an adapter's version, which vLLM finds while somebody holds it."""
        return f"multilora-{lora.lora_int_id}-{self._secret}"

    @contextmanager
    def hold(self, lora: LoRARequest) -> Iterator[str]:
        """Lets vLLM find an adapter's version by its name until the end of the block."""
        name = self.name_of(lora)
        self._table[name] = lora
        self._users[name] += 1
        try:
            yield name
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._table[name]


@dataclass(frozen=True)
class _Led:
    """A request as vLLM gets it.

    Attributes:
        scope: With its headers.
        receive: Gives its body.
        chosen: What is to answer it.
    """

    scope: Scope
    receive: Receive
    chosen: Chosen = field(default_factory=Chosen)


class NamesMiddleware:
    """Leads each request to the adapter that it names.

    Args:
        app: Answers the requests.
        models: vLLM's table of models.
    """

    def __init__(self, app: ASGIApp, models: Any) -> None:
        self._app = app
        self._models = models
        self._names = VersionNames(models.lora_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await only_base_model(self._app, self._models)(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST":
            await self._call(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = current_call.get()
        assert call is not None  # set by what is in front of this
        led = await self._lead(call, scope, receive)  # which keeps no body while it is answered
        if isinstance(led, Response):
            await led(scope, receive, send)
            return
        if (caller := current_caller.get()) is not None:
            await caller.begin_text()  # only now: until here it may wait for its adapter
        if led.chosen.lora is None:
            await self._app(led.scope, led.receive, send)
        else:
            lora = led.chosen.lora
            shown = led.chosen.rendered if call.renders else lora.lora_name
            with self._names.hold(lora) as name:
                await self._app(led.scope, led.receive, ReplacedText(send, name, shown).send)

    async def _lead(self, call: HttpCall, scope: Scope, receive: Receive) -> _Led | Response:
        """Reads a request, and writes into it by which name vLLM finds what is to answer it."""
        body, parts = await read_body(scope, receive)
        fields: dict[str, Any] = {} if body is None else body
        call.is_form, caller = isinstance(body, FormBody), current_caller.get()
        model = fields.get(MODEL)
        if call.path == INVOCATIONS:
            scope, named = without_sagemakers(scope)
            model = model if named is None else named
        if model is not None and not isinstance(model, str):
            message = f"model: found {type(model).__name__}, expected a string."
            return error_answer(HTTPStatus.BAD_REQUEST, message, path=call.path, param=MODEL)
        unchanged = _Led(scope, again(parts, receive))
        # A tenant's call that names nothing asks for the base model.
        is_call = caller is not None and endpoint_of("POST", call.path) is Endpoint.CALL
        is_chat = call.path.endswith(TAKE_DEFAULTS)
        if body is None or not (model or BLEND_FIELD in fields or is_call or is_chat):
            return unchanged
        if caller is not None:
            expect_results(caller, call.path, fields)
        chosen = await choose(call, self._models, model, fields)
        if not isinstance(chosen, Chosen):
            return refusal_answer(chosen, path=call.path)
        if chosen.lora is not None:
            name = self._names.name_of(chosen.lora)
            return await _written(call, scope, receive, body, name, chosen)
        known = chosen.name or model
        is_invoked = call.path == INVOCATIONS and not self._models.is_base_model(known)
        if not known or not (is_invoked or chosen.name):
            return unchanged
        if is_invoked and not _fits_header(known):
            message = "model: found characters that SageMaker's header cannot carry."
            return error_answer(HTTPStatus.BAD_REQUEST, message, path=call.path, param=MODEL)
        return await _written(call, scope, receive, body, known, chosen)


def _fits_header(name: str) -> bool:
    try:
        name.encode("latin-1")
    except UnicodeEncodeError:
        return False
    return True


async def _written(
    call: HttpCall,
    scope: Scope,
    receive: Receive,
    body: JsonBody | FormBody,
    name: str,
    chosen: Chosen,
) -> _Led:
    """A request with a name as its body's `model` and, where SageMaker reads it, in its header."""
    content, kind = await body.written(name, BLEND_FIELD)
    changed = {b"content-length": str(len(content)).encode()}
    if kind is not None:
        changed[b"content-type"] = kind
    if call.path == INVOCATIONS and _fits_header(name):
        changed[SAGEMAKER_HEADER] = name.encode("latin-1")
    kept = [pair for pair in scope["headers"] if pair[0] not in (*changed, b"transfer-encoding")]
    scope = {**scope, "headers": [*kept, *changed.items()]}
    message = {"type": "http.request", "body": content, "more_body": False}
    return _Led(scope, again([message], receive), chosen)


def without_sagemakers(scope: Scope) -> tuple[Scope, str | None]:
    """A request without SageMaker's header, and the model that the header names, if it does."""
    found = [value.decode("latin-1") for key, value in scope["headers"] if key == SAGEMAKER_HEADER]
    headers = [pair for pair in scope["headers"] if pair[0] != SAGEMAKER_HEADER]
    return {**scope, "headers": headers}, next((each for each in found if each.strip()), None)


def expect_results(caller: Caller, path: str, fields: dict[str, Any]) -> None:
    """Says how a call has its embeddings told, if it is for some."""
    if path == _COHERE_EMBEDDINGS:
        caller.expect_results("float")
    elif path.endswith(_SHOWN_RESULTS):
        form = fields.get("encoding_format", "float")
        caller.expect_results(form if isinstance(form, str) else None)
