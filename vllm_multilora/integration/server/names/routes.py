"""Routes in an API server: from a public model name to the adapter that answers a request.

A route is resolved where the gateway reads the model's name in a request's body, before vLLM does.
The answer's `model` names the adapter, as OpenAI's names the model behind an alias.

An adapter is unavailable, and a route's fallback answers, if there is none of its name, if its
first load from an adapter directory is refused, or if its last load in the engine failed. A
request's adapter is chosen before the engine sees the request. So the request that discovers the
failure is answered with its status, and later ones get the fallback. The adapter is tried again in
the background, and answers again once it has been loaded; one that is quarantined, when its name
stands for another version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission

from vllm_multilora.adapters.blend import folders_of, is_blend
from vllm_multilora.documents import WatchedFile
from vllm_multilora.failures import FailureKind, LoadFailure, RequestFailure
from vllm_multilora.integration import failed_requests
from vllm_multilora.integration.api_server.failure_delivery import ON_FAILURE
from vllm_multilora.integration.attached import Attached
from vllm_multilora.integration.patching.activation import settings_of
from vllm_multilora.integration.server.names import blend_names, registration, resolvers
from vllm_multilora.integration.server.names.public_names import is_base_model, public_names
from vllm_multilora.integration.server.names.refusals import next_pause
from vllm_multilora.integration.server.requests import callers
from vllm_multilora.integration.server.requests.callers import Caller, current_caller
from vllm_multilora.integration.server.requests.http_calls import current_call
from vllm_multilora.metrics.label_values import BLENDS
from vllm_multilora.metrics.server_counts import COUNTS
from vllm_multilora.routing.request_facts import RequestError, RequestFacts
from vllm_multilora.routing.route_targets import Blended, Candidate, Turns
from vllm_multilora.routing.routes_file import Routes, parse_routes

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

ROUTES: Attached[ServerRoutes] = Attached("routes")
"""The routes of vLLM's `OpenAIServingModels`."""

REFRESH_S = 1.0
"""Least time between two looks at the file while only known names are asked for."""

RETRY_S = 5.0
"""Until an adapter whose load has failed is tried again; then twice as long, up to a minute."""

LOOK_LIMIT_S = 5.0
"""For one look at the file: storage that hangs must not keep requests for ever."""

_MAX_LED = 1_024


class ServerRoutes:
    """The routes of one API server, in a file; used on its event loop only.

    Raises:
        DocumentError: The file cannot be used.
    """

    def __init__(self, models: Any, path: str) -> None:
        self._models = models
        self._file = WatchedFile(path, self._parse, "routes")
        self._turns = Turns()
        self._failed: dict[int, LoadFailure] = {}  # by the adapter's number
        self._led: set[int] = set()  # the blends that routes have led to
        self._replaced: set[tuple[str, Candidate]] = set()  # routes and what has a fallback in use
        self._due = time.monotonic() + REFRESH_S
        self._refreshing: asyncio.Task[None] | None = None
        self._began = 0.0  # by the monotonic clock, when that was

    def __contains__(self, name: object) -> bool:
        return name in self._file.value.targets

    async def cards(self, caller: Caller | None = None) -> list[ModelCard]:
        """The routes that somebody may use, as `/v1/models` lists them."""
        await self._refresh()
        base = self._models.base_model_paths[0].name
        return [
            ModelCard(id=name, parent=base, permission=[ModelPermission()])
            for name in self._file.value.targets
            if caller is None or caller.may_use(name, is_base=False, is_route=True)
        ]

    def leads_to(self) -> dict[str, list[str]]:
        """The names that each route may lead to; a blend's parts are named one by one."""
        targets = self._file.value.targets
        return {route: list(dict.fromkeys(target.names())) for route, target in targets.items()}

    async def look_for(self, name: str | None) -> None:
        """Sees to it that a route which has just been written is known."""
        if name and name not in self and not self._is_served(name):
            await self._refresh()
        elif time.monotonic() >= self._due:
            self._begin_refresh()

    async def lead(
        self, name: str, fields: Mapping[str, Any]
    ) -> str | LoRARequest | ErrorResponse | None:
        """Finds what a route leads a request to, which names something and has a body's fields.

        Returns:
            The name of an adapter or of the base model, or a blend; the answer to the request
            where the route leads nowhere; None where the name is no route's.
        """
        target = self._file.value.targets.get(name)
        if target is None:
            return None
        try:
            metadata, call = fields.get("metadata"), current_call.get()
            metadata = metadata if isinstance(metadata, Mapping) else {}
            facts = RequestFacts(fields.get("user"), metadata, {} if call is None else call.headers)
            candidates = target.candidates(facts, self._turns)
        except RequestError as error:
            return _error(HTTPStatus.BAD_REQUEST, f"The model `{name}` is a route. {error}.")
        chosen, refusal = await self._choose(name, candidates)
        if chosen is None:
            return refusal
        label = BLENDS if isinstance(chosen, Blended) else chosen
        COUNTS.count_route(name, label, "chosen" if chosen == candidates[0] else "fallback")
        found: str | LoRARequest = label
        if isinstance(chosen, Blended):
            blend = blend_names.blend_now(self._models, chosen.weights)
            assert blend is not None  # nothing was awaited since it was chosen
            self._note_led(blend.lora_int_id)
            found = blend
        if call is not None:
            call.route = name
            call.adapter = found if isinstance(found, str) else found.lora_name
        return found

    def note_failure(self, lora: LoRARequest, failure: LoadFailure) -> None:
        """Takes an adapter out of routes with fallbacks until it has been loaded again."""
        if isinstance(failure, RequestFailure):
            return
        number = lora.lora_int_id
        if is_blend(lora.lora_path) and number not in self._led:
            return  # a client's own; there is no end to them
        if registration.is_current(self._models, lora):
            is_known = number in self._failed
            self._failed[number] = failure
            if not is_known:
                registration.in_background(self._try_again(lora))

    def _note_led(self, blend: int) -> None:
        """A route has led to a blend; every new version of a part makes it another one."""
        if len(self._led) >= _MAX_LED:
            self._led.clear()
        self._led.add(blend)

    async def _try_again(self, lora: LoRARequest) -> None:
        models, pause_s = self._models, RETRY_S
        try:
            await asyncio.sleep(pause_s)
            while registration.is_current(models, lora):
                # The engine has a quarantined one, and serves it to nobody.
                is_quarantined = self._failed[lora.lora_int_id].kind is FailureKind.QUARANTINED
                if not is_quarantined and await registration.admit(models, lora) is None:
                    break
                pause_s = next_pause(pause_s)
                await asyncio.sleep(pause_s)
        finally:
            del self._failed[lora.lora_int_id]
        if not registration.is_current(models, lora):
            # Whoever has taken its name away may have removed it before it was read again.
            registration.without_waiting(registration.remove_later(models, lora))

    async def _choose(
        self, route: str, candidates: tuple[Candidate, ...]
    ) -> tuple[Candidate | None, ErrorResponse | None]:
        """The first candidate that is available, or why there is none."""
        refusals: dict[Candidate, ErrorResponse] = {}
        for name in candidates:
            if (refusal := await self._refusal(name)) is None:
                chosen: Candidate | None = name
                self._replaced.discard((route, name))
                break
            refusals[name] = refusal
        else:
            # The engine tries again, and says exactly what is wrong.
            chosen = next((name for name in candidates if self._is_served(name)), None)
        if chosen is not None:
            for name, refusal in refusals.items():
                if chosen != name and (route, name) not in self._replaced:
                    self._replaced.add((route, name))
                    logger.warning(
                        "Route %r: %r is unavailable (%s), and %r answers for it.",
                        *(route, str(name), refusal.error.message, str(chosen)),
                    )
            return chosen, None
        first = refusals[candidates[0]].error
        reasons = "; ".join(refusal.error.message for refusal in refusals.values())
        return None, _error(
            HTTPStatus(first.code),
            f"The model `{route}` is a route, and no adapter of it is available: {reasons}",
        )

    async def _refusal(self, candidate: Candidate) -> ErrorResponse | None:
        """Why a name or a blend is unavailable; None if it is available."""
        models = self._models
        if not isinstance(candidate, Blended):
            is_base = is_base_model(models, candidate)
            return None if is_base else await self._refusal_of(candidate)
        if self._no_blends is not None:
            return _error(HTTPStatus.BAD_REQUEST, self._no_blends)
        for name in candidate.names():
            if (refusal := await self._refusal_of(name)) is not None:
                return refusal
        blend = blend_names.blend_now(models, candidate.weights)
        if blend is None:
            return _error(HTTPStatus.NOT_FOUND, f"an adapter of `{candidate}` was unloaded")
        return self._failure_of(blend)

    async def _refusal_of(self, name: str) -> ErrorResponse | None:
        if (refusal := await resolvers.find(self._models, name)) is not None:
            return refusal
        lora = public_names(self._models).get(name)
        if lora is None:
            return _error(HTTPStatus.NOT_FOUND, f"there is no adapter `{name}`")
        return self._failure_of(lora)

    @cached_property
    def _no_blends(self) -> str | None:
        return blend_names.why_none(self._models)

    def _failure_of(self, lora: LoRARequest) -> ErrorResponse | None:
        failure = self._failed.get(lora.lora_int_id)
        if failure is None:
            return None
        caller, message = current_caller.get(), failure.message
        if caller is not None:
            for folder in folders_of(lora.lora_path):
                message = caller.shown(message, folder)
        return _error(failed_requests.STATUS[failure.kind], message)

    def _is_served(self, name: Candidate) -> bool:
        if isinstance(name, Blended):
            are_there = all(part in public_names(self._models) for part, _ in name.weights)
            return are_there and self._no_blends is None
        return name in public_names(self._models) or self._models.is_base_model(name)

    def _parse(self, file: str, text: str) -> Routes:
        routes = parse_routes(file, text)
        routes.check_names([m.name for m in self._models.base_model_paths], "the base model")
        routes.check_names(public_names(self._models), "an adapter")
        return routes

    async def _refresh(self) -> None:
        look = self._begin_refresh()
        await asyncio.wait({look}, timeout=self._began + LOOK_LIMIT_S - time.monotonic())

    def _begin_refresh(self) -> asyncio.Task[None]:
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._read_again())
            self._began = time.monotonic()
        return self._refreshing

    async def _read_again(self) -> None:
        if await self._file.refresh_on_thread():
            self.tell_unknown()
        self._due = time.monotonic() + REFRESH_S

    def tell_unknown(self) -> None:
        known = [*public_names(self._models), *(m.name for m in self._models.base_model_paths)]
        for route, names in self._file.value.unknown(set(known)).items():
            logger.warning(
                "The route %r leads to names that nobody serves yet: %s", route, ", ".join(names)
            )


def start(models: Any) -> None:
    """Puts the routes that the settings name in force, if they name any.

    Raises:
        DocumentError: The file cannot be used, or a route has an adapter's name.
    """
    path = settings_of(models.engine_client.vllm_config).routes
    if path is not None:
        routes = ServerRoutes(models, path)
        ROUTES.set(models, routes)
        registration.ROUTE_NAMES.set(models, routes)
        ON_FAILURE.set(models.engine_client.output_processor, routes.note_failure)


def _error(status: HTTPStatus, message: str) -> ErrorResponse:
    return callers.error_response(status, message, "model")
