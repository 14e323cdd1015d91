"""Puts the name of one version of an adapter in the place of the name in a request's body.

Every endpoint of vLLM's looks its model up in one table, by name. The gateway reads the name in the
body, finds the adapter, and writes a name into the body that stands for this version in the table
until the request has been answered. A reload changes nothing for requests that are on their way.
"""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from vllm_multilora.adapters.blend import BLEND_FIELD
from vllm_multilora.adapters.problems import shown_name
from vllm_multilora.gateway.changed_answers import ReplacedText
from vllm_multilora.gateway.endpoints import endpoint_of, error_answer, refusal_answer
from vllm_multilora.gateway.names.bodies import MODEL, FormBody, again, as_json, read_body
from vllm_multilora.gateway.request_ids import for_vllm
from vllm_multilora.integration.failed_requests import AdapterRefusedError
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names.model_names import (
    TAKE_DEFAULTS,
    Chosen,
    choose,
    takes_any_name,
)
from vllm_multilora.integration.server.names.public_names import is_base_model, public_names
from vllm_multilora.integration.server.names.routes import ROUTES
from vllm_multilora.integration.server.requests.callers import (
    MAX_RESULTS,
    MAX_RESULTS_AS,
    Caller,
    current_caller,
)
from vllm_multilora.integration.server.requests.http_calls import HttpCall, current_call
from vllm_multilora.integration.server.requests.own_templates import OWN_TEMPLATES
from vllm_multilora.tenants.rules import INVOCATIONS, Endpoint

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from vllm.lora.request import LoRARequest

SAGEMAKER_HEADER = b"x-amzn-sagemaker-adapter-identifier"
"""Replaces the `model` of bodies at `/invocations`; without the header SageMaker drops `model`."""

_SHOWN_RESULTS = ("/embeddings", "/pooling", INVOCATIONS)
"""Ends of the paths whose bodies have an `encoding_format`, `float` by default."""
_COHERE_EMBEDDINGS = "/v2/embed"
_SECRET_BYTES = 8
_VIOLATION = 1008  # of the server's policy, by RFC 6455


class VersionNames:
    """Registers versions of adapters in vLLM's table; used on the server's event loop only.

    Nobody can guess the names. They do not get out of this process: answers have the public names.
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


class NamesMiddleware:
    """Leads each request to the adapter that it names."""

    def __init__(self, app: ASGIApp, models: Any) -> None:
        self._app = app
        self._models = models
        self._names = VersionNames(models.lora_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await only_base_model(self._app, self._models, scope, receive, send)
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
        scope, receive, chosen = led
        send = self._with_route(call, chosen, send)
        if (caller := current_caller.get()) is not None:
            await caller.begin_text()  # only now: until here it may wait for its adapter
        if (lora := chosen.lora) is None:
            await self._app(scope, receive, send)
        else:
            shown = chosen.rendered if call.renders else lora.lora_name
            with self._names.hold(lora) as name:
                await self._app(scope, receive, ReplacedText(send, name, as_json(shown)).send)

    @cached_property
    def _shows_routes(self) -> bool:
        return settings_of(self._models.engine_client.vllm_config).route_names

    def _with_route(self, call: HttpCall, chosen: Chosen, send: Send) -> Send:
        """Has the answer to a route's name call the model so, where the settings say that."""
        if call.route is None or not self._shows_routes:
            return send
        lora, route = chosen.lora, f'"model":"{as_json(call.route)}"'
        bases = [base.name for base in self._models.base_model_paths]
        for name in bases if lora is None else [lora.lora_name]:
            shown = json.dumps(name, ensure_ascii=False)  # as vLLM writes it
            send = ReplacedText(send, f'"model":{shown}', route).send
        return send

    async def _lead(
        self, call: HttpCall, scope: Scope, receive: Receive
    ) -> tuple[Scope, Receive, Chosen] | Response:
        """Reads a request, and writes into it by which name vLLM finds what is to answer it."""
        body, parts = await read_body(scope, receive)
        fields: dict[str, Any] = {} if body is None else body
        if "request_id" not in fields:
            scope = for_vllm(scope)
        call.is_form, caller = isinstance(body, FormBody), current_caller.get()
        refused = partial(error_answer, HTTPStatus.BAD_REQUEST, path=call.path)
        templates = OWN_TEMPLATES.get(self._models.engine_client)
        if templates is not None and (fault := templates.fault_in(fields)) is not None:
            return refused(fault)
        model = fields.get(MODEL)
        if call.path == INVOCATIONS:
            scope, named = without_sagemakers(scope)
            model = model if named is None else named
        if model is not None and not isinstance(model, str):
            return refused(f"model: found {type(model).__name__}, expected a string.", param=MODEL)
        unchanged = scope, again(parts, receive), Chosen()
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
        name = chosen.name or model if chosen.lora is None else self._names.name_of(chosen.lora)
        is_invoked, is_base = call.path == INVOCATIONS, self._models.is_base_model(name)
        if not name or not (chosen.lora or chosen.name or (is_invoked and not is_base)):
            return unchanged
        if templates is not None and chosen.lora is not None:
            try:
                await templates.apply(call.path, chosen.lora, fields)
            except AdapterRefusedError as error:
                return refused(str(error))
        # The name is the body's `model` and, where SageMaker reads it, in its header.
        content, kind = await body.written(name, BLEND_FIELD)
        changed = {b"content-length": str(len(content)).encode()}
        if kind is not None:
            changed[b"content-type"] = kind
        if is_invoked and name.isascii():
            changed[SAGEMAKER_HEADER] = name.encode()
        elif is_invoked and not is_base:
            message = "model: found characters that SageMaker's header cannot carry."
            return refused(message, param=MODEL)
        kept = [p for p in scope["headers"] if p[0] not in (*changed, b"transfer-encoding")]
        scope = {**scope, "headers": [*kept, *changed.items()]}
        part = {"type": "http.request", "body": content, "more_body": False}
        return scope, again([part], receive), chosen


def without_sagemakers(scope: Scope) -> tuple[Scope, str | None]:
    """A request without SageMaker's header, and the model that the header names, if it does."""
    found = [value.decode("latin-1") for key, value in scope["headers"] if key == SAGEMAKER_HEADER]
    headers = [pair for pair in scope["headers"] if pair[0] != SAGEMAKER_HEADER]
    return {**scope, "headers": headers}, next((each for each in found if each.strip()), None)


def expect_results(caller: Caller, path: str, fields: dict[str, Any]) -> None:
    """Bounds the answer of a call by how it has its embeddings told, if it is for some."""
    form = "float" if path == _COHERE_EMBEDDINGS else None
    if path.endswith(_SHOWN_RESULTS):
        form = fields.get("encoding_format", "float")
    if isinstance(form, str):
        caller.most_results = MAX_RESULTS_AS.get(form, MAX_RESULTS)


async def only_base_model(
    app: ASGIApp, models: Any, scope: Scope, receive: Receive, send: Send
) -> None:
    """Serves vLLM's WebSocket, `/v1/realtime`; closes it when its client names another model.

    vLLM answers such an event with an error, and goes on with the base model if the client has
    named that before.
    """
    is_closed = False

    async def receive_checked() -> Message:
        nonlocal is_closed
        message = await receive()
        is_event = message["type"] == "websocket.receive"
        if not is_event or (fault := _fault(models, message)) is None:
            return message
        is_closed = True
        event = json.dumps({"type": "error", "error": fault, "code": "model_not_found"})
        await send({"type": "websocket.send", "text": event})
        await send({"type": "websocket.close", "code": _VIOLATION, "reason": "model"})
        return {"type": "websocket.disconnect", "code": _VIOLATION}

    async def send_open(message: Message) -> None:
        if not is_closed:
            await send(message)

    await app(scope, receive_checked, send_open)


def _fault(models: Any, message: Message) -> str | None:
    """Why a session may not set the model that an event sets; None where it may, or sets none."""
    try:
        event = json.loads(message.get("text") or message.get("bytes") or "")
    except (ValueError, RecursionError):
        return None
    is_update = isinstance(event, dict) and event.get("type") == "session.update"
    model = event.get("model") if is_update else None
    if model is None or model == "" or is_base_model(models, model):
        return None
    names = (public_names(models), ROUTES.get(models) or ())
    if isinstance(model, str) and any(model in each for each in names):
        base = models.base_model_paths[0].name
        return f"/v1/realtime serves no adapters: found the model `{model}`, expected `{base}`."
    if takes_any_name():
        return None
    return f"The model `{shown_name(str(model))}` does not exist."
